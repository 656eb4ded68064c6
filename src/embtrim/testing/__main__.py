"""`python -m embtrim.testing` prints the matrix of methods and promises."""

import argparse

from embtrim.testing.matrix import conformance_matrix, matrix_configs

argparse.ArgumentParser(
    prog="python -m embtrim.testing",
    description="Check what every search method promises, on toy tasks; a table, after a few minutes.",
).parse_args()
print(conformance_matrix(matrix_configs()))
