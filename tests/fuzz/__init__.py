"""Fuzzing of every parser: targets, seeds, and each input that ever failed (``failed/``), which ``make test`` replays.

``python -m tests.fuzz --minutes 10 FOLDER`` (``make fuzz``) runs on: coverage-guided by atheris, one target after another in
a child process, with the corpora, the counts and what was found kept in ``FOLDER``.
"""
