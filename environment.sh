# Finds or makes a Python environment that satisfies requirements.txt, and sets PYTHON to its interpreter. Sourced by the launchers.
#
# The active python3 is used if it satisfies the requirements; otherwise .venv (or $VENV) beside this file is created and filled, once.

project="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VENV="${VENV:-$project/.venv}"

# The launchers' first word. A mistyped one should not cost the set-up.
if [[ -n ${preset:-} ]] && [[ ! $preset =~ ^(demo|folder|cifar10|cifar100|cifar100-anytime|imagenet)$ || " $* " == *" --preset"* ]]; then
    echo "$(basename "$0"): the first word is the preset: demo, folder, cifar10, cifar100, cifar100-anytime or imagenet" >&2
    exit 2
fi

satisfies_requirements() {
    "$1" - "$project/requirements.txt" <<'EOF' 2>/dev/null
import re
import sys
from importlib.metadata import version


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]]


for line in open(sys.argv[1]):
    line = line.split("#")[0].strip()
    if line:
        name, least = line.split(">=")
        if numbers(version(name)) < numbers(least):
            sys.exit(1)
EOF
}

supported_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

fill_environment() {
    [[ -x $VENV/bin/python ]] || "$1" -m venv "$VENV" 2>/dev/null || "$1" -m venv --without-pip "$VENV" || return
    local pip=("$VENV/bin/python" -m pip)
    if ! "${pip[@]}" --version >/dev/null 2>&1; then
        # Debian and Ubuntu without python3-venv: the base interpreter's pip, from 22.3, can fill another environment.
        pip=("$1" -m pip --python "$VENV/bin/python")
        if ! "${pip[@]}" --version >/dev/null 2>&1; then
            echo "$1 can make no environment with pip; install python3-venv" >&2
            return 1
        fi
    fi
    "${pip[@]}" install --quiet --requirement "$project/requirements.txt"
}

prepare_environment() {
    local base="${PYTHON:-python3}"
    if ! supported_python "$base"; then
        echo "$base is missing or older than Python 3.10; set PYTHON to a newer one" >&2
        return 2
    fi
    if satisfies_requirements "$base"; then
        PYTHON="$base"
        return
    fi
    if ! satisfies_requirements "$VENV/bin/python"; then
        echo "setting up the Python environment $VENV from requirements.txt, once (several GB, some minutes)"
        if ! fill_environment "$base"; then
            echo "could not set up $VENV: see the message above; run the same command again to go on" >&2
            return 2
        fi
    fi
    PYTHON="$VENV/bin/python"
}

prepare_environment || exit

# Threads that wait for each other spin for microseconds only. GNU OpenMP's default, about a millisecond, makes small networks many times
# slower as soon as another program uses a core.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
