# Sourced by bash on every machine of a cluster started by `ray up`: environment of Ray's processes, and functions.
. ~/acpo/env.sh
# Settings of a single machine, for example ACPO_RAY_OPTIONS='--labels=acpo-role=learner'.
[ ! -f ~/acpo/host.sh ] || . ~/acpo/host.sh

export PATH=$HOME/acpo/venv/bin:$PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
# Disables job queues of MLflow that tracking does not need: eight processes, and files left in /dev/shm.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export ACPO_RUNS=$ACPO_SHARED/runs HF_HOME=${HF_HOME:-$ACPO_SHARED/huggingface}
# Jobs run on the head, where MLflow listens on loopback.
export MLFLOW_TRACKING_URI=http://127.0.0.1:$ACPO_MLFLOW_PORT
# Ray keeps many connections open; use the limit of this machine.
ulimit -n "$(ulimit -Hn)"
# Time for a stopped job to release its workers before it is killed.
export RAY_JOB_STOP_WAIT_TIME_S=60

# Install the copied wheel and the pinned requirements, unless they are installed.
acpo_install() {
    local wanted python wheel
    # `ray down` calls `ray stop` on the head, and continues silently if there is no `ray`.
    grep -qs acpo/venv/bin ~/.bashrc || echo 'export PATH=$PATH:$HOME/acpo/venv/bin' >> ~/.bashrc
    # The newest wheel; `ray up` copies new files and keeps old ones, and pip rejects several wheels.
    wheel=$(ls -t ~/acpo/dist/*.whl | head -n 1)
    [ -n "$wheel" ] || { echo "no wheel in dist: build it with hatchling build -t wheel" >&2; return 1; }
    find ~/acpo/dist -name '*.whl' ! -path "$wheel" -delete
    wanted=$(cat ~/acpo/requirements.txt "$wheel" | sha256sum)
    [ "$(cat ~/acpo/venv/.acpo-installed 2>/dev/null)" != "$wanted" ] || return 0
    if [ ! -x ~/acpo/venv/bin/python ]; then
        python=$(command -v python3.11 || command -v python3.12 || command -v python3.13 || true)
        if [ -n "$python" ]; then
            "$python" -m venv ~/acpo/venv || return 1
        else
            # Ubuntu 22.04 has only Python 3.10; uv installs another one.
            python3 -m pip install --user -q uv && ~/.local/bin/uv venv -q --seed --python 3.11 ~/acpo/venv || return 1
        fi
    fi
    ~/acpo/venv/bin/pip install -q -r ~/acpo/requirements.txt &&
        ~/acpo/venv/bin/pip install -q --no-deps --force-reinstall "$wheel" &&
        echo "$wanted" > ~/acpo/venv/.acpo-installed
}

acpo_as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

acpo_firewall() {
    [ -n "$ACPO_NETWORK" ] || return 0
    command -v nft >/dev/null || acpo_as_root apt-get install -y -qq nftables || return 1
    acpo_as_root nft -f - <<RULES
table inet acpo
delete table inet acpo
table inet acpo {
    chain input {
        type filter hook input priority 0; policy accept;
        iif lo accept
        ct state established,related accept
        ip saddr { $ACPO_NETWORK } accept
        tcp dport 1024-65535 reject with tcp reset
        udp dport 1024-65535 drop
    }
}
RULES
}

acpo_mount() {
    [ -d "$ACPO_SHARED" ] || acpo_as_root install -d -o "$USER" "$ACPO_SHARED" || return 1
    if [ -n "$ACPO_NFS" ] && ! mountpoint -q "$ACPO_SHARED"; then
        command -v mount.nfs4 >/dev/null || acpo_as_root apt-get install -y -qq nfs-common || return 1
        acpo_as_root mount -t nfs4 -o nfsvers=4.1,hard,timeo=600,retrans=2 "$ACPO_NFS" "$ACPO_SHARED" || return 1
        if ! mountpoint -q "$ACPO_SHARED"; then
            echo "ACPO_NFS=$ACPO_NFS is not mounted at $ACPO_SHARED: a run's files would be on this machine alone" >&2
            return 1
        fi
        acpo_as_root chown "$USER" "$ACPO_SHARED" || return 1
    fi
    mkdir -p "$ACPO_RUNS" "$HF_HOME"
}

# Only on the head, on loopback: `ray attach cluster.yaml -p 5000` forwards it. It ends with Ray.
acpo_mlflow() {
    curl -fs -o /dev/null "$MLFLOW_TRACKING_URI/health" && return 0
    nohup setsid bash -c '
        mlflow server --host 127.0.0.1 --port "$ACPO_MLFLOW_PORT" --workers 1 \
            --backend-store-uri "$ACPO_MLFLOW_DB" --artifacts-destination "$ACPO_MLFLOW_ARTIFACTS" &
        server=$!
        while pgrep -u "$(id -u)" -x gcs_server >/dev/null; do sleep 2; done
        kill $server; wait' > ~/acpo/mlflow.log 2>&1 < /dev/null &
}

# For own machines other than the head: `ray down` ends Ray only on the head. The raylets of the others end after a
# minute without the head, but not the process that reads the logs.
acpo_end_with_head() {
    nohup setsid bash -c '
        raylet=$(pgrep -n -u "$(id -u)" -x raylet)
        reader=$(pgrep -n -u "$(id -u)" -f "[r]ay/_private/log_monitor.py")  # [r] excludes this line
        while kill -0 $raylet; do sleep 2; done
        kill $reader' > /dev/null 2>&1 < /dev/null &
}

# Stop the processes of an earlier `ray up`.
acpo_stop() {
    ray stop --force >/dev/null 2>&1 || true
}

# Remove what `ray up` installed on this machine, after `ray down`; keeps the content of ACPO_SHARED.
acpo_remove() {
    acpo_stop
    [ -z "$ACPO_NETWORK" ] || acpo_as_root nft delete table inet acpo 2>/dev/null
    sed -i '\|acpo/venv/bin|d' ~/.bashrc
    rm -rf ~/acpo ~/.ray/auth_token ~/ray_bootstrap_config.yaml ~/ray_bootstrap_key.pem /tmp/ray
}
