#!/usr/bin/env bash
# Installs rlkit and the developers' tools, then runs every check: ruff, pyright, the fast tests, the slow ones.
#   bash launchers/test.sh [pytest argument ...]
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launchers/setup.sh" dev || exit $?
cd "$root" || exit 1
export PATH="$root/.venv/bin:$PATH"
failed=() none=0

check() {  # $1: its name; the rest: the command
  echo "test: $1"
  "${@:2}" || failed+=("$1")
}
tests() {  # pytest's status 5 is "no test selected": fine for one of the two, as with `-k`
  local status=0
  echo "test: $1 tests"
  python -m pytest -q -m "$2" "${@:3}" || status=$?
  if (( status == 5 )); then none=$((none + 1)); elif (( status )); then failed+=("$1 tests"); fi
}

check ruff python -m ruff check .
check pyright python -m pyright
tests fast "not slow and not study and not gpu" "$@"
tests slow "slow and not study and not gpu" "$@"
if (( none == 2 )); then failed+=("no test was selected"); fi

if (( ${#failed[@]} )); then
  (IFS=,; echo "test: FAILED: ${failed[*]}" >&2)
  exit 1
fi
echo "test: all passed"
