#!/usr/bin/env bash
# Set up the environment as the launchers do, and run the tests; arguments are passed to pytest.
set -euo pipefail

for_tests=1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[[ $PYTHON != [!/]*/* ]] || PYTHON="$PWD/$PYTHON" # such as VENV=env
cd "$project"
[[ $# -gt 0 ]] || echo "running the tests; on two cores they take about three minutes"
exec "$PYTHON" -m pytest "$@"
