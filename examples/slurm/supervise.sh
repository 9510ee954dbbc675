# Sourced by the sbatch scripts of this folder, which differ in what they ask Slurm for: one megapre supervisor per
# node, each of which starts its share of the ranks.
#   supervise JOB.toml [table.key=value ...]
# Before the time limit Slurm signals the script (--signal=B:USR1@SECONDS), the ranks save and end with exit code 75,
# and the job goes back into the queue; it resumes from that checkpoint.
# MEGAPRE names the command (default: megapre), DOCTOR=0 skips the look at the nodes. MASTER_ADDR is needed only where
# node names do not resolve.

say() {
    echo "$(date '+%F %T') $*"
}

# examine LOGS RUN_DIR...: end the job where a node should not be trusted with it.
examine() {
    local logs=$1 code
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --output="$logs/doctor-%n.txt" \
        "${MEGAPRE:-megapre}" doctor
    code=$?
    grep -h '^megapre: ' "$logs"/doctor-*.txt
    if [ "$code" -ne 0 ]; then
        say "a node was refused (exit code $code): all its checks are in $logs/doctor-*.txt"
        exit "$code"
    fi
}

supervise() {
    local logs="logs/${SLURM_JOB_ID}" attempt="${SLURM_RESTART_COUNT:-0}" code
    mkdir -p "$logs"
    say "job $SLURM_JOB_ID attempt $attempt on $SLURM_JOB_NODELIST; logs in $logs"

    # Set before anything takes time: a signal that comes while the nodes are examined is acted on afterwards.
    local stop=0 step=0
    # shellcheck disable=SC2317,SC2329  # the trap calls it
    forward() {
        say "time is nearly up: asking the ranks to save and stop"
        stop=1
        [ "$step" -ne 0 ] && kill -USR1 "$step" # srun passes it on to the supervisors
    }
    trap forward USR1

    [ "${DOCTOR:-1}" = 0 ] || examine "$logs"
    if [ "$stop" -eq 0 ]; then
        # --cpu-bind=none: a supervisor hands its cores to its ranks, so Slurm must not pin them all to one socket.
        srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --output="$logs/node-%n-attempt-$attempt.txt" \
            "${MEGAPRE:-megapre}" train "$@" &
        step=$!
        # A trapped signal ends `wait` early: wait again until srun itself is gone.
        while true; do
            wait "$step"
            code=$?
            kill -0 "$step" 2>/dev/null || break
        done
    else
        code=75
    fi

    say "megapre ended with exit code $code"
    if [ "$code" -eq 75 ]; then
        say "back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    elif [ "$code" -ne 0 ]; then
        tail -n 20 "$logs"/node-*-attempt-"$attempt".txt
    fi
    exit "$code"
}
