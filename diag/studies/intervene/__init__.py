"""Changing attention, layer by layer, and measuring what that costs or gains.

plan.py     what is to be done
sweep.py    the model run untouched and changed
effect.py   what a change of the outcome is worth, per input
relation.py rank correlation with an interval
tables.py   what the sweep says, in numbers; words.py in words
run.py      the folder
"""
