#!/usr/bin/env bash
# Train on a Cloud TPU slice: create the slice, install this checkout on all its workers, run, start
# again after a preemption or a dead worker, and delete the slice at the end.
#
#   NAME=clip ZONE=us-east5-b TYPE=v5litepod-256 launch/tpu_vm.sh up train vit_l14 \
#       --workdir gs://bucket/runs/l14
#
#   up COMMAND...   create, install, run until the run is done, then delete
#   create          request the slice and wait until it is active
#   install         copy and install this checkout on every worker
#   run COMMAND...  run a clip-jax command once on every worker
#   delete          delete the slice
#
# Environment variables say where to run, with the default in parentheses:
#   NAME      name of the slice (clip)
#   ZONE      Google Cloud zone (required)
#   TYPE      accelerator type, such as v6e-64 (required)
#   RUNTIME   image of the TPU VMs (v2-alpha-tpuv5-lite, for v5e; others are in README.md)
#   SPOT      1 for a spot slice, which is cheaper and may be preempted (0)
#   SLICES    number of slices of that type (1)
#   MAX_FAST  attempts in a row that end within two minutes before the script gives up (3)
#
# If this script is interrupted, run the same command again: it finds the slice by its name and the
# run by its run directory, which must be in a bucket.
set -euo pipefail

NAME=${NAME:-clip}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-0}
SLICES=${SLICES:-1}
MAX_FAST=${MAX_FAST:-3}
POLL=${POLL:-30}
ROOT=$(cd "$(dirname "$0")/.." && pwd)

die() { printf 'tpu_vm.sh: %s\n' "$*" >&2; exit 2; }
say() { printf 'tpu_vm.sh: %s\n' "$*" >&2; }
tpu() { gcloud compute tpus "$@" --zone "$ZONE"; }

nodes() {
  if [ "$SLICES" = 1 ]; then echo "$NAME"; else seq -f "$NAME-%.0f" 0 $((SLICES - 1)); fi
}

state() { tpu queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || echo NONE; }

create() {
  local flags=(--accelerator-type "$TYPE" --runtime-version "$RUNTIME")
  if [ "$SLICES" = 1 ]; then
    flags+=(--node-id "$NAME")
  else
    flags+=(--node-count "$SLICES" --node-prefix "$NAME")
  fi
  if [ "$SPOT" = 1 ]; then flags+=(--spot); fi
  while :; do
    case $(state) in
      ACTIVE) return ;;
      NONE) say "requesting $TYPE as $NAME"; tpu queued-resources create "$NAME" "${flags[@]}" ;;
      FAILED | SUSPENDED) delete ;;
    esac
    sleep "$POLL"
  done
}

delete() {
  say "deleting $NAME"
  tpu queued-resources delete "$NAME" --force --quiet
}

everywhere() { # runs a shell command on all workers of all slices at once
  local node jobs=() failed=0
  for node in $(nodes); do
    tpu tpu-vm ssh "$node" --worker=all --command="$1" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return "$failed"
}

install() {
  local archive node
  archive=$(mktemp -d)
  git -C "$ROOT" archive --prefix=clip_jax_source/ -o "$archive/clip_jax.tar.gz" HEAD
  for node in $(nodes); do
    tpu tpu-vm scp "$archive/clip_jax.tar.gz" "$node:" --worker=all
  done
  rm -r "$archive"
  # Images with Ubuntu 22.04 have Python 3.10, which is too old; there, uv installs a newer one.
  everywhere 'tar xzf clip_jax.tar.gz &&
    if python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
      python3 -m venv clip_jax_env
    else
      python3 -m pip install -q --user uv &&
        python3 -m uv venv -q --allow-existing --seed --python 3.12 clip_jax_env
    fi && clip_jax_env/bin/pip install -q "./clip_jax_source[tpu,gs]"'
}

# Returns the exit code of the command: 0 if it is 0 on all workers, 2 if it is 2 on any, else 1. The
# workers print their codes, since gcloud's own code does not tell which worker failed.
run() {
  local log codes
  log=$(mktemp)
  # SIGTERM reaches the workers when a slice is preempted, and the run then saves.
  everywhere "cd clip_jax_source && ../clip_jax_env/bin/clip-jax$(printf ' %q' "$@"); \
    echo \"clip-jax exit code \$?\"" 2>&1 | tee "$log" >&2 || true
  codes=$(sed -n 's/.*clip-jax exit code \([0-9]*\).*/\1/p' "$log" | sort -un | tr '\n' ' ')
  rm "$log"
  case " $codes" in
    *" 2 "*) return 2 ;;
    " 0 ") return 0 ;;
    *) return 1 ;;
  esac
}

up() {
  local fast=0 began code
  while :; do
    create
    install || { say "installing failed; trying again"; sleep "$POLL"; continue; }
    began=$(date +%s) code=0
    # A run without progress ends itself, with exit code 2.
    run "$@" --processes.max-starts 5 || code=$?
    case $code in
      0) delete; say "done"; return 0 ;;
      2) say "not started again: exit code 2 means wrong use or input (see above)"
         say "the slice still runs; delete it with \`$0 delete\`"; return 2 ;;
    esac
    if [ $(($(date +%s) - began)) -lt 120 ]; then fast=$((fast + 1)); else fast=0; fi
    if [ "$fast" -ge "$MAX_FAST" ]; then
      say "$fast attempts in a row ended within two minutes; not started again"
      say "the slice still runs; delete it with \`$0 delete\`"
      return 1
    fi
    say "the run ended early; starting again from the run directory"
    sleep "$POLL"
  done
}

[ $# -ge 1 ] || die "the first argument must be up, create, install, run or delete (see the top of $0)"
: "${ZONE:?set ZONE, such as ZONE=us-east5-b}"
verb=$1
shift
case $verb in
  create) : "${TYPE:?set TYPE, such as TYPE=v5litepod-256}"; create ;;
  install | delete) "$verb" ;;
  run | up)
    : "${TYPE:?set TYPE, such as TYPE=v5litepod-256}"
    case " $* " in
      *" --workdir gs://"*) ;;
      *) die "set --workdir gs://..., since the workers share no disk" ;;
    esac
    "$verb" "$@"
    ;;
  *) die "unknown command $verb; use up, create, install, run or delete" ;;
esac
