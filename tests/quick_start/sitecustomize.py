"""Python processes of tests look for garbage seldom, and not when they end: with Paddle each starts and ends in 0.9 s, not 1.3.

Python imports this where the folder is on its path. Beside frameworks, looking every 700 objects takes a tenth of the time.
"""
import atexit
import gc

gc.set_threshold(50_000, 20, 50)
atexit.register(gc.freeze)  # what lives on until the end is no garbage
