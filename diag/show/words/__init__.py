"""Profiles in plain sentences: what one line shows, which of several is strongest, and how sure that is.

Nothing is claimed beyond the data. Where an interval includes 0, the sentence says "not distinguishable";
where it leaves out 0 only because it is too narrow for so few inputs, "too close to call"; with fewer than
five inputs, that they are too few to judge. No torch.
"""

from diag.show.words.control import uncontrolled
from diag.show.words.one_line import summary
from diag.show.words.several_lines import comparison

__all__ = ["comparison", "summary", "uncontrolled"]
