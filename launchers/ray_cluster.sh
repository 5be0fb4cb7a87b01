#!/usr/bin/env bash
# Starts or stops this machine's part of a Ray cluster that rlkit then joins. Every machine has the same checkout, set up with
# launchers/setup.sh, and sees the same run folders and models.
#   bash launchers/ray_cluster.sh head [port]          on the first machine; says what to run on the others
#   bash launchers/ray_cluster.sh worker host:port     on every other one
#   bash launchers/ray_cluster.sh stop                 on each, at the end
# Then, on the first machine:  rlkit train cluster=ray cluster.address=host:port ...
# Nobody joins without the head's token: copy ~/.ray/auth_token to the same place on every other machine.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
die() { echo "ray_cluster: $*" >&2; exit 1; }
command -v ray >/dev/null || die "ray is not installed here. Run: bash launchers/setup.sh"

case "${1:-}" in
head)
  port=${2:-6379}
  ray get-auth-token --generate >/dev/null 2>&1 || die "ray made no token. Is ~/.ray writable?"
  # The dashboard would take jobs from anybody who reaches it.
  ray start --head --port="$port" --include-dashboard=false --disable-usage-stats >/dev/null ||
    die "ray start failed. Is port $port taken? Choose another: bash launchers/ray_cluster.sh head 6380"
  address="$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$port"
  echo "ray_cluster: head at $address"
  echo "ray_cluster: on every other machine, with this one's ~/.ray/auth_token:  bash launchers/ray_cluster.sh worker $address"
  echo "ray_cluster: then here:  rlkit train cluster=ray cluster.address=$address"
  ;;
worker)
  [[ "${2:-}" == *:* ]] || die "which head? Write: bash launchers/ray_cluster.sh worker host:port"
  [[ -n "${RAY_AUTH_TOKEN:-}" || -f "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]] || die "no token: copy ~/.ray/auth_token from the head"
  ray start --address="$2" --disable-usage-stats >/dev/null || die "no head answers at $2. Start it first: bash launchers/ray_cluster.sh head"
  echo "ray_cluster: joined $2"
  ;;
stop)
  ray stop >/dev/null
  echo "ray_cluster: stopped"
  ;;
*)
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
  ;;
esac
