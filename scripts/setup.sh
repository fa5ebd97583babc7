#!/usr/bin/env bash
# Set up an environment for asarm. Run it (bash scripts/setup.sh) or source it, which also activates the environment.
#
# An active virtual or conda environment is used; otherwise .venv is made here. Nothing is installed a second time while
# requirements.txt and pyproject.toml stay the same. ASARM_NO_INSTALL=1 uses the environment as it is (on a cluster whose own
# torch must stay, say); PYTHON=... names the interpreter for .venv (3.11 or newer).

asarm_setup() {
    local root stamp want
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        if [ ! -x "$root/.venv/bin/python" ]; then
            echo "setup: making $root/.venv"
            "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
                { echo "setup: ${PYTHON:-python3} is older than 3.11; name a newer one with PYTHON=..." >&2; return 1; }
            "${PYTHON:-python3}" -m venv "$root/.venv" || return 1
        fi
        # shellcheck disable=SC1091
        source "$root/.venv/bin/activate"
    fi
    [ "${ASARM_NO_INSTALL:-0}" = 1 ] && return 0
    stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.asarm-installed"
    want="$root $(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "setup: installing requirements.txt and asarm into ${VIRTUAL_ENV:-$CONDA_PREFIX} (a few minutes)"
        python -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" || return 1
        python -m pip install --quiet --disable-pip-version-check --no-deps --editable "$root" || return 1
        echo "$want" > "$stamp"
    fi
    echo "setup: $(python --version) in ${VIRTUAL_ENV:-$CONDA_PREFIX}"
}

asarm_setup
