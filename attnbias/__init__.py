"""The package `diag` by the name that it is installed by: `import attnbias` is `import diag`."""

import sys

import diag

sys.modules[__name__] = diag
