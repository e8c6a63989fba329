"""What runs inside the sandbox. It imports the standard library alone and is bound there read-only.

Z  zygote: a warm interpreter that sees one program at a time
M  a program's minder: makes its namespaces, and ends them when its whole time is up
P  a program's keeper: sets its limits, compiles it, starts a process a test, measures it, ends it
T  a test's process: what the model wrote runs here, and nothing that T says is believed

No expected answer is ever in here, but in the trusted test of `run_check`, which has a keeper of its own.
"""
