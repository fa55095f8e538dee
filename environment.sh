# Finds or makes a Python environment that satisfies requirements.txt, and sets PYTHON to its interpreter.
# Sourced by the launchers.
#
# The active python3 is used if it satisfies the requirements; otherwise .venv beside this file (or $VENV) is
# created and filled, once.

project="$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VENV="${VENV:-$project/.venv}"
VENV="${VENV/#\~\//$HOME/}" # in quotes the shell leaves ~ as it is

# The launchers' first word, checked here because a mistyped one should not cost the set-up.
presets="$(sed -n 's/^    "\([a-z0-9-]*\)": {$/\1/p' "$project/presets.py" | xargs)" # the keys of PRESETS
if [[ -n ${preset:-} ]] && [[ " $presets " != *" $preset "* || " $* " == *" --preset"* ]]; then
    echo "$(basename "$0"): the first word is the preset: ${presets// /, }" >&2
    exit 2
fi

# What the tests alone need is asked for by run_tests.sh, which sets for_tests.
satisfies_requirements() {
    "$1" - "$project/requirements.txt" "${for_tests:-}" <<'EOF' 2>/dev/null
import re
import sys
from importlib.metadata import version


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]]


for line in open(sys.argv[1]):
    line, _, comment = map(str.strip, line.partition("#"))
    if line and (comment != "tests" or sys.argv[2]):
        name, least = line.split(">=")
        if numbers(version(name)) < numbers(least):
            sys.exit(1)
EOF
}

supported_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

make_environment() {
    # Python's venv keeps links, also those to a Python that has gone. A folder that is no environment stays.
    if [[ -f $VENV/pyvenv.cfg ]] && ! "$VENV/bin/python" -c "" 2>/dev/null; then
        rm -f "$VENV"/bin/python*
    fi
    # Without pip it is half made: the set-up was interrupted, or python3-venv is missing.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$1" -m venv "$VENV" || return
    "$VENV/bin/python" -m pip install --requirement "$project/requirements.txt"
}

prepare_environment() {
    local base="${PYTHON:-python3}"
    if supported_python "$base" && satisfies_requirements "$base"; then
        PYTHON="$base"
        return
    fi
    if ! satisfies_requirements "$VENV/bin/python"; then
        if ! supported_python "$base"; then
            echo "$base is missing or older than Python 3.10; set PYTHON to a newer one" >&2
            return 2
        fi
        if ! mkdir -p "$VENV" 2>/dev/null || [[ ! -w $VENV ]]; then
            echo "cannot write $VENV; VENV=/a/folder/of/yours bash $(basename "$0") makes the environment elsewhere" >&2
            return 2
        fi
        echo "setting up the Python environment $VENV from requirements.txt, once (several GB, some minutes)"
        if ! make_environment "$base"; then
            echo "could not set up $VENV: see the message above; run the same command again to continue" \
                "(Debian and Ubuntu need the package python3-venv; VENV=/a/folder/of/yours uses another folder)" >&2
            return 2
        fi
    fi
    PYTHON="$VENV/bin/python"
}

prepare_environment || exit
