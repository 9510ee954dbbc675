# Sourced by the sbatch scripts of this folder, which differ in what they ask Slurm for: one megapre supervisor per
# node, each of which starts its share of the ranks.
#   supervise JOB.toml [table.key=value ...]
# Before the time limit Slurm signals the script (--signal=B:USR1@SECONDS), the ranks save and end with exit code 75,
# and the job goes back into the queue; it resumes from that checkpoint.
# First megapre doctor examines every node, then the ranks together; a node that is refused, or does not answer within
# DOCTOR_MINUTES (10), is excluded and the job queued again, for at most EXCLUDE nodes (4) of a job.
# MEGAPRE names the command (default: megapre), DOCTOR=0 skips the look at the nodes. MASTER_ADDR is needed only where
# node names do not resolve.

say() {
    echo "$(date '+%F %T') $*"
}

# replace NODES LOGS CODE: leave these nodes out and queue the job again, or end it with CODE.
replace() {
    local nodes=$1 logs=$2 code=$3 before others
    touch "$logs/excluded"
    if [ "$SLURM_NNODES" -gt 1 ] && [ "$(wc -w <<<"$nodes")" -eq "$SLURM_NNODES" ]; then
        say "all nodes were refused: that is the cluster's or the job's fault, and other nodes would not help"
        exit "$code"
    fi
    if [ $(($(wc -w <"$logs/excluded") + $(wc -w <<<"$nodes"))) -gt "${EXCLUDE:-4}" ]; then
        say "more than EXCLUDE=${EXCLUDE:-4} nodes of this job were refused: $(xargs <"$logs/excluded") $nodes"
        exit "$code"
    fi
    others=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u |
        grep -vcxF -e "${nodes// /$'\n'}" -f "$logs/excluded")
    if [ "$others" -lt "$SLURM_NNODES" ]; then
        say "the partition $SLURM_JOB_PARTITION has $others other nodes and the job needs $SLURM_NNODES"
        exit "$code"
    fi
    before=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2)
    [ "$before" = "(null)" ] && before=""
    trap '' TERM # a requeued job is ended; Slurm takes changes only of one that waits
    say "back into the queue without $nodes"
    scontrol requeue "$SLURM_JOB_ID" || exit "$code"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}${nodes// /,}"; then
            tr ' ' '\n' <<<"$nodes" >>"$logs/excluded"
            break
        fi
        sleep 0.2
    done
    exit "$code"
}

# look NAME LOGS ARGUMENTS...: one round of the doctor; ends the job where a node should not be trusted with it.
look() {
    local name=$1 logs=$2 code fit refused nodes
    shift 2
    rm -f "$logs/doctor-$name"-*.txt
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --time="${DOCTOR_MINUTES:-10}" \
        --output="$logs/doctor-$name-%n.txt" "${MEGAPRE:-megapre}" doctor "$@"
    code=$?
    grep -h '^megapre: ' "$logs/doctor-$name"-*.txt
    [ "$code" -eq 0 ] && return
    say "the doctor ended with exit code $code: all its checks are in $logs/doctor-$name-*.txt"
    [ "$code" -eq 2 ] && exit 2
    refused=$(sed -n 's/^refused: //p' "$logs/doctor-$name"-*.txt)
    # Of a look at each node alone, one that gave no verdict hung or could not even start.
    if [ "$name" = node ]; then
        fit=$(sed -n 's/^fit: //p' "$logs/doctor-$name"-*.txt)
        refused=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "${fit:-none}")
    fi
    nodes=$(echo $refused) # one line
    [ -n "$nodes" ] && replace "$nodes" "$logs" "$code"
    exit "$code"
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

    if [ "${DOCTOR:-1}" != 0 ]; then
        look node "$logs" --only node "$@"
        [ "$stop" -eq 0 ] && look ranks "$logs" --only ranks "$@"
    fi
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
