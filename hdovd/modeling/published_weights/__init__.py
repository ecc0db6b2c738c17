"""Names of the authors' published weights, and ours."""
