# Shared by the launchers: go to the repository, set up, run `python -m asarm` with the launcher's command and the user's arguments.

asarm_launch() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    mkdir -p logs
    # shellcheck disable=SC1091
    source scripts/setup.sh
    exec python -m asarm "$@"
}
