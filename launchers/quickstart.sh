#!/usr/bin/env bash
# Installs rlkit into the checkout's .venv, then trains: the built-in task with no arguments, or what the arguments say.
#   bash launchers/quickstart.sh [override ...]      the same overrides as `rlkit train`
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launchers/setup.sh"
export PATH="$root/.venv/bin:$PATH"
echo "quickstart: rlkit train${*:+ $*}"
exec rlkit train "$@"
