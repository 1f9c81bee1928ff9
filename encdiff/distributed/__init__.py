"""Several processes as one: who this one is, what they tell each other, which rows of a batch are whose.

Import from the modules: `launch` tells without loading torch whether there are several, `processes` joins them. Imports
errors and terminal.
"""
