// Equations, set by the KaTeX that is served with the site.
const equations = [...document.querySelectorAll(".arithmatex")];
for (const node of equations) {
  const text = node.textContent.trim();
  katex.render(text.slice(2, -2), node, { displayMode: text.startsWith("\\["), throwOnError: false });
}

// An equation that would run into its number is followed by it instead, and scrolls.
function makeRoom() {
  for (const node of equations) {
    const tag = node.querySelector(".katex-tag");
    if (!tag) continue;
    node.classList.remove("wide");
    const ends = [...node.querySelectorAll(".katex-base")].map((part) => part.getBoundingClientRect().right);
    node.classList.toggle("wide", Math.max(...ends) + 8 > tag.getBoundingClientRect().left);
  }
}
document.fonts.ready.then(makeRoom);
addEventListener("resize", makeRoom);
