"""Test suites of other projects, run against ours from a checkout that is not part of the repository."""
