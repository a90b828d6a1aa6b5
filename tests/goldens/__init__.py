"""Arrays of reference implementations on random weights, and the program that compares ours with them:
python -m tests.goldens FOLDER.
"""
