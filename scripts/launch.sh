# Shared by the launchers: set up, then run `python -m asarm` with the launcher's command and the user's arguments, in the folder where the
# user is (under sbatch: where the job was submitted).

asarm_launch() {
    local root
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    # shellcheck disable=SC1091
    source "$root/scripts/setup.sh"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    exec python -m asarm "$@"
}
