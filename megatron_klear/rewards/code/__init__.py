"""The code reward: programs run in a sandbox, what they give is judged outside of it.

extract      the program in a response
forms        ground truths of all the usual forms, as `problem.Problem`
asserts      tests written in Python, split into what runs inside and what is compared outside
compare      text and values
judge        a program against the tests of a problem
reward       the reward that a data source gets
"""
