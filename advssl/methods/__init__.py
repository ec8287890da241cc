"""One module for each method. The folders named by the variable ADVSSL_METHODS are searched too: a module there is a method like the others."""

import os

__path__ += [folder for folder in os.environ.get("ADVSSL_METHODS", "").split(os.pathsep) if folder]
