"""The file of published numbers: verified ones alone, each once, and none that anybody only remembers."""

import csv
import re

import pytest

from advssl.method import methods
from advssl.suite.published import (
    FILE,
    IDENTITY,
    KINDS,
    METRICS,
    OUTSIDE,
    PROTOCOLS,
    STATUSES,
    Published,
    band,
    complaint,
    published,
    quote,
    read_published,
)

NUMBERS = read_published()

# Cells that are quoted everywhere and that nobody here has read in a source: (method, data, protocol, metric, value).
UNREAD = """
rocl cifar10 slf PGD-20 39.54; rocl cifar10 slf AutoAttack 28.38; rocl cifar10 slf clean 79.90; acl cifar10 slf AutoAttack 39.13
acl cifar10 slf PGD-20 42.87; acl cifar10 slf clean 77.88; advcl cifar10 slf AutoAttack 42.57
supervised-at cifar10 supervised AutoAttack 42.22; supervised-at cifar10 supervised PGD-20 44.40
supervised-at cifar10 supervised clean 79.77; supervised-at cifar10 supervised AutoAttack 46.19
supervised-at cifar10 supervised PGD-20 49.89; supervised-at cifar10 supervised clean 79.86; rocl cifar10 aff AutoAttack 47.88
rocl cifar10 aff PGD-20 51.35; rocl cifar10 aff clean 81.01; acl cifar10 aff AutoAttack 49.27; acl cifar10 aff PGD-20 52.82
acl cifar10 aff clean 82.19; advcl cifar10 aff AutoAttack 49.77; advcl cifar10 aff PGD-20 52.77; advcl cifar10 aff clean 83.62
rocl cifar100 slf AutoAttack 8.66; rocl cifar100 slf PGD-20 18.79; rocl cifar100 slf clean 49.53; acl cifar100 slf AutoAttack 16.33
acl cifar100 slf PGD-20 20.97; acl cifar100 slf clean 47.51; advcl cifar100 slf AutoAttack 19.78; advcl cifar100 slf PGD-20 27.67
advcl cifar100 slf clean 48.34; acl cifar100 aff AutoAttack 23.63; acl cifar100 aff PGD-20 29.38; acl cifar100 aff clean 56.61
advcl cifar100 aff AutoAttack 24.72; advcl cifar100 aff PGD-20 28.73; advcl cifar100 aff clean 56.77; acl cifar10 slf AutoAttack 37.62
acl cifar10 slf clean 79.32; advcl cifar10 slf AutoAttack 37.46; advcl cifar10 slf clean 73.23; dynacl cifar10 slf AutoAttack 45.04
dynacl cifar10 slf clean 77.41; dynacl++ cifar10 slf AutoAttack 46.46; dynacl++ cifar10 slf clean 79.81; rocl cifar10 slf clean 80.43
rocl cifar10 slf PGD-20 47.69; simclr cifar10 slf clean 91.25; rocl cifar10 slf PGD-20 9.55; clae cifar10 linear clean 83.32
clae cifar100 linear clean 55.52; simclr cifar10 linear clean 83.27; mochi imagenet-100 linear clean 79.0
moco-v2 imagenet-100 linear clean 78.0; beit imagenet-1k fine-tune clean 83.2
"""
UNREAD = [tuple(cell.split()) for cell in re.split(r"[;\n]", UNREAD.strip())]
ANYWHERE = {
    "82.19",
    "52.82",
    "16.07",
    "78.30",
    "18.22",
    "48.13",
    "51.52",
    "81.19",
    "4.17",
    "6.23",
    "47.91",
    "80.05",
    "49.83",
    "94.05",
    "91.34",
    "83.27",
    "83.32",
    "53.79",
    "55.52",
    "41.62",
    "40.11",
}


@pytest.mark.parametrize("cell", UNREAD, ids=" ".join)
def test_no_number_from_memory(cell):
    method, data, protocol, metric, value = cell
    assert not [
        n for n in NUMBERS if (n.method, n.data, n.protocol, n.metric) == (method, data, protocol, metric) and n.number == float(value)
    ]


def test_no_value_that_stands_in_unread_tables_alone():
    found = [(n.method, n.value) for n in NUMBERS if n.value in ANYWHERE]
    assert found == [("adv-rotation", "18.22")]  # of Chen et al., which was read


def test_methods_without_a_number_stay_without():
    assert not {"clae", "adios", "arocl", "aacl"} & {n.method for n in NUMBERS}
    assert not any("MEM" in " ".join(vars(n).values()) for n in NUMBERS)


def test_format():
    with open(FILE, newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(NUMBERS) > 400 and not FILE.read_bytes().count(b"\r")
    assert len({tuple(getattr(n, name) for name in IDENTITY) for n in NUMBERS}) == len(NUMBERS)
    for n in NUMBERS:
        assert (
            n.status in STATUSES and n.kind in KINDS and n.metric in METRICS and n.protocol in PROTOCOLS and n.source and not complaint(n)
        )
        assert (
            0 <= n.number <= 100
            and re.fullmatch(r"\d+(\.\d+)?", n.value)
            and re.fullmatch(r"(\d+(\.\d+)?)?", n.spread)
            and re.fullmatch(r"\d*", n.epochs)
        )
        assert (n.method in methods()) != (n.method in OUTSIDE)
        assert re.fullmatch(r"none|(linf \d+/255|linf 0\.031|l2 128/255|l2 0\.5)", n.threat)
        assert all(v == v.strip() for v in vars(n).values())
    assert {n.method for n in NUMBERS} >= set(OUTSIDE), "a name outside the registry without a number"


def test_robust_accuracy_never_exceeds_clean_and_stronger_attacks_leave_less():
    """Whoever swaps two cells of a line breaks this."""
    of = {}
    for n in NUMBERS:
        of.setdefault((n.method, n.variant, n.data, n.protocol, n.backbone, n.epochs, n.kind, n.source), {})[n.metric, n.threat] = (
            n.number
        )
    for place, found in of.items():
        clean = found.get(("clean", "none"))
        robust = {metric: v for (metric, threat), v in found.items() if threat != "none" and metric != "epoch"}
        if clean is not None:
            assert all(v < clean for v in robust.values()), place
        if {"AutoAttack", "PGD-20"} <= set(robust):
            assert robust["AutoAttack"] < robust["PGD-20"], place
        if "PGD-100" in robust:
            assert robust["CW-100"] < robust["PGD-100"] <= robust["PGD-20"], place


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        ({"method": "adv-selfie", "protocol": "aff", "metric": "PGD-20"}, "51.05"),
        ({"method": "untrained", "protocol": "aff", "metric": "epoch"}, "99"),
        ({"method": "rocl", "protocol": "slf", "metric": "PGD-20"}, "40.27"),
        ({"method": "acl", "protocol": "aff", "metric": "PGD-20", "kind": "paper"}, "52.8"),
        ({"method": "aff-ensemble", "metric": "AutoAttack"}, "51.56"),
        (
            {
                "method": "byorl",
                "protocol": "alf",
                "data": "cifar10",
                "backbone": "PreActResNet-34 x4",
                "variant": "",
                "metric": "APGD+MT+Square",
            },
            "77.61",
        ),
        ({"method": "ifm", "variant": "margin 0.1", "data": "imagenet-100"}, "81.4"),
        ({"method": "rush", "metric": "PGD"}, "77.8"),
        ({"method": "mochi", "data": "imagenet-1k"}, "68.0"),
    ],
    ids=str,
)
def test_numbers_that_everybody_looks_up(wanted, value):
    (one,) = published(**wanted)
    assert one.value == value


def test_weak_sources_are_named_as_such():
    weak = [n for n in NUMBERS if n.status == "V2-weak"]
    assert weak and all("third-party notes" in n.source for n in weak)
    assert all("EOT" in n.note or "expectation" in n.note for n in published(method="rush"))
    assert all("ImageNet" in n.note for n in published(method="advcl", kind=("paper", "third-party")))


def test_bands():
    assert tuple(band("deacl", "cifar10", "slf", "AutoAttack"))[:2] == (43.13, 46.14)
    assert tuple(band("acl", "cifar10", "aff", "PGD-20")) == (
        45.47,
        49.91,
        ("VITA-Group/Adversarial-Contrastive-Learning issue #21", "VITA-Group/Adversarial-Contrastive-Learning issue #19"),
    )
    assert band("advcl", "cifar10", "slf", "PGD-20") is None, "runs that failed are no band"
    assert band("adv-selfie", "cifar10", "aff", "PGD-20") is None, "a paper's own number is no re-run"
    assert tuple(band("rocl", "cifar10", "slf", "PGD"))[:2] == (30.21, 30.21) and tuple(band("rocl", "cifar10", "slf", "PGD-20"))[:2] == (
        40.27,
        40.27,
    ), "attacks are not mixed"
    with pytest.raises(ValueError, match="name one as threat"):
        band("engstrom 2019", "cifar10", "supervised", "AutoAttack")
    assert band("engstrom 2019", "cifar10", "supervised", "AutoAttack", "l2 0.5").low == 69.24
    with pytest.raises(ValueError, match="no metric 'robust'"):
        band("acl", "cifar10", "aff", "robust")


def test_quotes_do_not_mix():
    with pytest.raises(ValueError, match="must not mix"):
        quote(published(method="deacl", protocol="slf", metric=("PGD-20", "AutoAttack")))
    assert quote([]) == "" and quote(published(method="ifm")[:1]) == "81.1"


def test_a_word_that_is_unknown_is_an_error():
    for wanted, what in (
        ({"metric": "AA"}, "no metric"),
        ({"method": "rockl"}, "no method"),
        ({"data": "cifar"}, "no data"),
        ({"eps": "8"}, "no column"),
    ):
        with pytest.raises(ValueError, match=what):
            published(**wanted)


GOOD = vars(NUMBERS[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "MEM-M"},
        {"status": ""},
        {"kind": "memory"},
        {"metric": "AA"},
        {"protocol": "SLF"},
        {"value": "101"},
        {"value": "-1"},
        {"value": "x"},
        {"value": ""},
        {"spread": "x"},
        {"epochs": "many"},
        {"method": "nobody"},
        {"threat": "none"},
        {"source": ""},
    ],
    ids=str,
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, wrong):
    path = tmp_path / "p.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(GOOD))
        writer.writeheader()
        writer.writerows([vars(NUMBERS[0]), GOOD | wrong])
    with pytest.raises(ValueError, match="line 3"):
        read_published(path)
    assert not complaint(Published(**GOOD))


def test_a_number_that_is_there_already_is_refused(tmp_path):
    path = tmp_path / "p.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(GOOD))
        writer.writeheader()
        writer.writerows([GOOD, GOOD | {"value": "1.00", "note": "another"}])
    with pytest.raises(ValueError, match="line 3: says the same as line 2"):
        read_published(path)
