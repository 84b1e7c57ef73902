"""`meco doctor`: what is installed, what a run here will really use, what is wrong, how to mend it.

Facts (`facts`) are collected in processes of their own (`probes`), verdicts are a pure function of
them (`verdicts`), and the command prints those (`command`). Costs the slowest import, a few
seconds. What was given up: nothing is computed on the GPU, so a card that answers and then fails is
not found.
"""
