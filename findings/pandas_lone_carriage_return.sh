#!/usr/bin/env bash
# pandas 3.1.1 on Python 3.11: a text with a lone carriage return does not come back from a CSV file.
#
# `to_csv` quotes a field that holds a line feed, but not one that holds a carriage return alone; `read_csv` takes
# that carriage return for the end of a line. A row becomes two, silently: the second half of the text stands in the
# first column, the number of the first is lost. The writer is Python's own `csv`, which quotes what is in its line
# terminator: with `lineterminator="\r\n"` the row is kept.
#
# Seen: 2 rows written, 3 read, without an error; with "\r\n" as the line terminator, 2 read.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet pandas==3.1.1
"$place/env/bin/python" - "$place/t.csv" <<'PYTHON'
import sys

import pandas as pd

file = sys.argv[1]
table = pd.DataFrame({"name": ["first\rsecond", "third"], "value": [1.5, 2.5]})
table.to_csv(file, index=False)
plain = pd.read_csv(file)
table.to_csv(file, index=False, lineterminator="\r\n")
quoted = pd.read_csv(file)
print(f"Python {sys.version.split()[0]}, pandas {pd.__version__}")
print(f"2 rows written, {len(plain)} read: {plain.to_dict('records')}")
print(f"with another line terminator {len(quoted)} read: {quoted.to_dict('records')}")
assert len(plain) == 3 and plain["name"][1] == "second" and plain["value"].isna().sum() == 1
assert quoted.equals(table)
PYTHON
