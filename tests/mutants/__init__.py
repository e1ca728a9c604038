"""Mutation testing of the declarations: damages every built-in spec and every golden, and counts what nobody notices.

    make mutants                                  # everything; prints the score by kind and every survivor
    python -m tests.mutants --sample 200 --seed 1 # some of it
    python -m tests.mutants --only llama --list   # what would be done to one spec

A mutant of a spec is killed by registration, or by a case of `tests.mutants.cases`: the same assertions as in the
tests of the goldens and of the families, in process. One of a golden is killed where opening or comparing finds it. A
survivor that is not in equivalent.yaml, with the reason why it is no damage, fails the run.
"""
