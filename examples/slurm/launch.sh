#!/usr/bin/env bash
# What the job scripts in examples/ run on every node of the allocation: `p2o doctor` of the settings, then the same `p2o`.
#   exec bash examples/slurm/launch.sh CONFIG [arguments of p2o train]
#   exec bash examples/slurm/launch.sh eval TARGET [arguments of p2o eval]
# The run is called after the job: a job of the same name goes on where the last one stopped. Before its time limit a job
# saves and queues again, as it does after a failure if a checkpoint or an answer was written since its start.
#
# From the environment, which sbatch hands on, and where alone secrets belong:
#   P2O_RUNS           folder of the runs, on a filesystem that all nodes share; default: runs
#   P2O_IMAGE          container image: a .sif file for Apptainer, anything else for pyxis; default: none, .venv or what PATH has
#   P2O_MOUNTS         more mounts (FOLDER:FOLDER) than this folder, P2O_RUNS and what links in models/ and data/ lead to,
#                      comma-separated
#   P2O_CACHE          folder on each node's own disk for compiled kernels; default: /tmp/p2o-cache-UID. In a container it
#                      goes with the container, and every start compiles again, unless P2O_MOUNTS names it
#   P2O_HEAD_ADDRESS   address of the head node, where its host name is not the one to be reached at
set -euo pipefail

SHARED_FILE_TIMEOUT_S=30
TIME_POLL_S="${P2O_TIME_POLL_S:-30}"

: "${SLURM_JOB_ID:?launch.sh runs inside a Slurm job: submit a script of examples/ with sbatch}"
runs="${P2O_RUNS:-runs}"
run="$runs/$SLURM_JOB_NAME"
place="batch"
if [ "$1" = --on-node ]; then place="node" && shift; fi
work="train"
if [ "$1" = eval ]; then work="eval" && shift; fi
started="$run/.started-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
if [ -n "${P2O_IMAGE:-}" ]; then
    export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" # this folder is what runs, not the image's copy
else
    export PATH="$PWD/.venv/bin:$PATH"
fi

say() { echo "launch: $(date +%FT%T) $*"; }

# ---- in the batch step, on the head node

run_job() {
    local logs before status=0
    logs="logs/$SLURM_JOB_NAME-$SLURM_JOB_ID-restart${SLURM_RESTART_COUNT:-0}"
    mkdir -p logs "$run"
    rm -f "$run/stop" "$run"/.started-*
    touch "$started"
    before="$(progress)"
    stops=0 step=""
    trap stop_step USR1
    say "$SLURM_JOB_NAME on $SLURM_JOB_NODELIST, from ${before:-the start}; logs in $logs-*"
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=1 --output="$logs-%n-%N.log" "${container[@]}" "${inside[@]}" bash "$0" --on-node "${mode[@]}" "$@" &
    step=$!
    watch_time &
    watch=$!
    wait_for_step || status=$?
    kill "$watch" 2> /dev/null || true
    if [ "$status" -eq 0 ] && [ "$stops" -gt 0 ] && [ ! -e "$run/stop" ] && [ "$work" = train ]; then
        requeue "saved at $(progress)"
    elif [ "$status" -eq 0 ]; then
        rm -f "$run/stop"
        say "ended well"
    else
        tail -n 4 "$logs"-*.log
        say "failed with status $status"
        [ "$(progress)" = "$before" ] || requeue "$unit was written since the start"
    fi
    return "$status"
}

if [ "$work" = train ]; then
    unit="a checkpoint"
    mode=()
    progress() { cat "$run/checkpoints/latest" 2> /dev/null || true; }
    end_step() { touch "$run/stop"; }
else
    unit="a response"
    mode=(eval)
    progress() { cat "$run"/responses/*.jsonl 2> /dev/null | grep -c . | sed -n 's/^[1-9].*/& lines of responses/p' || true; }
    end_step() { [ -z "$step" ] || kill "$step"; } # srun ends its tasks; what has been sampled is on disk
fi

stop_step() {
    stops=$((stops + 1))
    say "stop requested"
    end_step
}

wait_for_step() {
    # A trapped signal ends `wait` early, with its own status.
    local seen status
    while :; do
        seen=$stops status=0
        wait "$step" || status=$?
        [ "$seen" -ne "$stops" ] || return "$status"
    done
}

# A run must be asked to stop before Slurm's own signal where its steps or rounds take longer than that leaves it.
watch_time() {
    local left needed
    while sleep "$TIME_POLL_S"; do
        left="$(seconds_left)" needed="$(seconds_needed)"
        if [ -z "$left" ] || [ -z "$needed" ] || [ "$left" -ge "$needed" ]; then continue; fi
        say "$left s are left, the run may need $needed s to come to a stop"
        kill -USR1 $$
        return
    done
}

seconds_left() {
    local end
    end="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([0-9T:-]*\) .*/\1/p')"
    [ -z "$end" ] || echo $(($(date -d "$end" +%s) - $(date +%s)))
}

# Twice the longest of the last 20 steps, what a round takes that training waits for, and a minute to save.
seconds_needed() {
    [ "$work" = train ] && [ -s "$run/metrics.jsonl" ] || return 0
    local longest_step longest_round
    longest_step="$(longest perf/step_s 20)" longest_round="$(longest perf/evolution_s 1000)"
    echo $((2 * ${longest_step:-0} + ${longest_round:-0} + 60))
}

longest() { # KEY COUNT: of the last COUNT values, rounded up
    local whole
    whole="$(grep -o "\"$1\": *[0-9]*" "$run/metrics.jsonl" | tail -n "$2" | sed 's/.*: *//' | sort -n | tail -n 1)" || true
    [ -z "$whole" ] || echo $((whole + 1))
}

requeue() {
    say "$1: queued again"
    scontrol requeue "$SLURM_JOB_ID" || say "Slurm refused: submit again to go on"
    exit "${status:-0}"
}

# The folders outside this one that symbolic links in models/ and data/ lead to: links mean nothing without them. A model in
# the Hugging Face cache is a folder of links, too.
linked_folders() {
    local link target
    while read -r link; do
        target="$(realpath -e "$link" 2> /dev/null)" || continue
        if [ -d "$target" ]; then
            echo "$target"
            find "$target" -maxdepth 1 -type l -exec realpath -ez {} + 2> /dev/null | xargs -0 -r dirname
        else
            dirname "$target"
        fi
    done < <(find models models/ data data/ -maxdepth 2 -type l 2> /dev/null | sort -u) | sort -u | grep -v "^$PWD\(/\|$\)"
}

container=() inside=()
if [ -n "${P2O_IMAGE:-}" ]; then
    mkdir -p "$runs"
    mounts="$PWD:$PWD,$(realpath "$runs"):$(realpath "$runs")"
    while read -r folder; do mounts="$mounts,$folder:$folder"; done < <(linked_folders)
    mounts="$mounts${P2O_MOUNTS:+,$P2O_MOUNTS}"
    case "$P2O_IMAGE" in
        *.sif) inside=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$P2O_IMAGE") ;;
        *) container=(--container-image="$P2O_IMAGE" --container-workdir="$PWD" --container-mounts="$mounts") ;;
    esac
fi

# ---- on every node

work_here() {
    local target="$1" cache="${P2O_CACHE:-/tmp/p2o-cache-$(id -u)}" patience="$SHARED_FILE_TIMEOUT_S"
    shift
    until [ -e "$started" ]; do
        [ "$patience" -gt 0 ] || fail "$PWD/$started, written by the head node, did not appear in ${SHARED_FILE_TIMEOUT_S} s: P2O_RUNS=$runs must be on a filesystem that all nodes share"
        patience=$((patience - 1))
        sleep 1
    done
    # Compilers write many small files, which shared filesystems are slow at; only their owner may write what is loaded.
    (umask 077 && mkdir -p "$cache")
    if [ ! -O "$cache" ] || [ -L "$cache" ]; then
        fail "P2O_CACHE=$cache must be a folder of your own: name another one"
    fi
    export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor" FLASHINFER_WORKSPACE_BASE="$cache"
    export SGLANG_CACHE_DIR="$cache/sglang" TVM_FFI_CACHE_DIR="$cache/tvm-ffi"
    local checked=() run_settings=(--set run.directory="$runs" --set run.name="$SLURM_JOB_NAME")
    [ "$work" = eval ] || settings_of "$target" "$@" "${run_settings[@]}"
    p2o doctor --strict --gpus "${SLURM_GPUS_ON_NODE:-0}" "${checked[@]}" || fail "p2o doctor found something missing"
    [ "$work" = train ] || exec p2o eval "$target" "$@" --output "$run"
    exec p2o train "$target" "$@" "${run_settings[@]}"
}

settings_of() {
    # Of what is for `p2o train`, `p2o doctor` takes the file and what it is changed by.
    checked=("$1")
    while shift && [ $# -gt 0 ]; do
        case "$1" in
            --set) checked+=("$1" "${2:-}") && shift ;;
            --set=*) checked+=("$1") ;;
        esac
    done
}

fail() {
    say "$SLURMD_NODENAME: $1" >&2
    exit 1
}

if [ "$place" = node ]; then
    work_here "$@"
else
    run_job "$@"
fi
