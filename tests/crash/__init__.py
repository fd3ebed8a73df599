"""The crash test: jobs that move money while everything around them is killed.

Run it with ``python -m tests.crash --storage filestorage --jobs 500 --kills 20``.
"""
