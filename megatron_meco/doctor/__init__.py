"""`meco doctor`: what is installed, what a run here will use, what is wrong, and how to fix it.

`facts` collects facts, heavy imports in separate processes (`probes`); `verdicts` judges them in a
pure function; `command` prints the result. It takes as long as the slowest import, a few seconds.
Nothing is computed on a GPU, so a card that answers and then fails is not found.
"""
