#!/bin/bash
# start.sh [DIR]   starts a private Slurm cluster on this one host; prints "export ..." lines on success.
#
# Environment (default):
#   LAB_MODE   flat  every node has the host's name and 127.x address, one TCP port per slurmd; no root needed
#                    netns every node has its own network, host name, pid and mount namespace (root needed):
#                          own IP (10.77.0.1N), names resolve, "power off" and "cable pulled" are one command
#   LAB_NODES (2)  LAB_CPUS (4, per node)  LAB_AUTH (munge | none)
#   LAB_GPUS (0)   fake GPUs per node (device nodes like /dev/null in DIR/dev; root): --gpus-per-node etc., CUDA_VISIBLE_DEVICES
#   LAB_EXTRA      more slurm.conf lines
#   LAB_SLURMD_TIMEOUT (300)  LAB_CRED_EXPIRE (5: less makes Slurm take its default of 120)  LAB_DEBUG (info)
# Exit status 77: cannot run here (program missing / not root), reason on stderr: a test should skip.
# Nothing outside DIR is written; /etc/slurm and /etc/munge are not used.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH
mode=${LAB_MODE:-flat} nodes=${LAB_NODES:-2} gpus=${LAB_GPUS:-0} cpus=${LAB_CPUS:-4} auth=${LAB_AUTH:-munge}
skip() { echo "start.sh: SKIP: $*" >&2; exit 77; }
for t in slurmctld slurmd srun sbatch scontrol sinfo; do
  command -v $t >/dev/null || skip "$t is not installed (Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge)"
done
[ "$auth" = none ] || command -v munged >/dev/null || skip "munged is not installed"
if [ "$mode" = netns ]; then
  [ "$(id -u)" = 0 ] || skip "netns mode needs root"
  unshare -n -u -m -p -f true 2>/dev/null || skip "no permission for unshare -n -u -m -p"
  command -v ip >/dev/null || skip "ip (iproute2) is not installed"
fi

dir=${1:-$(mktemp -d /tmp/slurm.XXXXXX)}
[ ${#dir} -le 60 ] || { echo "start.sh: DIR too long (a UNIX socket path has at most 107 bytes): $dir" >&2; exit 1; }
mkdir -p "$dir"/{state,spool,log,pid}; chmod 755 "$dir"; dir=$(cd "$dir" && pwd -P)
die() { echo "start.sh: $*" >&2; tail -n 15 "$dir"/log/*.log >&2 || true; "$here/stop.sh" "$dir" || true; exit 1; }
user=$(id -un)
: >"$dir/plugstack.conf"; : >"$dir/nodes"
nodetxt= gres=
if [ "$gpus" -gt 0 ]; then
  mkdir -p "$dir/dev"; for i in $(seq 0 $((gpus-1))); do mknod "$dir/dev/nvidia$i" c 1 3 2>/dev/null || skip "fake GPUs need mknod (root)"; done
  echo "Name=gpu Flags=nvidia_gpu_env File=$dir/dev/nvidia[0-$((gpus-1))]" >"$dir/gres.conf"; gres="Gres=gpu:$gpus "
fi
if [ "$mode" = flat ]; then
  host=$(hostname -s); ctladdr=127.0.0.1
  res=$(getent ahostsv4 "$host" | awk 'NR==1{print $1}') || true
  case "$res" in
    127.*) comm='CommunicationParameters=NoInAddrAny,NoCtldInAddrAny'; ctladdr=$res;;
    *)     comm='# host name does not resolve to 127.*: daemons listen on 0.0.0.0'
           echo "start.sh: warning: '$host' resolves to '${res:-nothing}', not to 127.*: the daemons will listen on every address" >&2;;
  esac
  mapfile -t ports < <(python3 -c '
import random,socket,sys
# Below the ports that the kernel gives to whoever asks: nobody is given one of these before its daemon listens, or while a node is off.
free=[]
while len(free)<int(sys.argv[1]):
    port=random.randrange(10000,20000)
    try:
        with socket.socket() as s: s.bind(("127.0.0.1",port))
    except OSError: continue
    if port not in free: free.append(port)
print(*free,sep="\n")' $((nodes+1)))
  ctlport=${ports[0]}
  for i in $(seq "$nodes"); do
    nodetxt+="NodeName=node$i NodeHostname=$host NodeAddr=$ctladdr Port=${ports[$i]} CPUs=$cpus RealMemory=4000 ${gres}State=UNKNOWN"$'\n'
  done
else
  host=ctl ctladdr=10.77.0.1 ctlport=6817 comm='# private network namespaces: nothing outside can connect'
  { echo "127.0.0.1 localhost"; echo "10.77.0.1 ctl"; for i in $(seq "$nodes"); do echo "10.77.0.$((10+i)) node$i"; done; } >"$dir/hosts"
  for i in $(seq "$nodes"); do
    nodetxt+="NodeName=node$i NodeHostname=node$i NodeAddr=10.77.0.$((10+i)) Port=6818 CPUs=$cpus RealMemory=4000 ${gres}State=UNKNOWN"$'\n'
  done
fi
cred="cred_expire=${LAB_CRED_EXPIRE:-5}"
if [ "$auth" = munge ]; then authtxt="AuthType=auth/munge"$'\n'"CredType=cred/munge"$'\n'"AuthInfo=socket=$dir/munge.socket,$cred"
else                         authtxt="AuthType=auth/none"$'\n'"CredType=cred/none"$'\n'"AuthInfo=$cred"; fi
conf=$dir/slurm.conf
K_HOST=$host K_CTLADDR=$ctladdr K_CTLPORT=$ctlport K_USER=$user K_AUTH=$authtxt K_DIR=$dir K_COMM=$comm K_NODES=$nodetxt${gres:+GresTypes=gpu}$'\n'${LAB_EXTRA:-} \
K_DEBUG=${LAB_DEBUG:-info} K_SLURMDTIMEOUT=${LAB_SLURMD_TIMEOUT:-300} K_FIRSTJOB=$((1 + RANDOM)) python3 -c '
import os,re,sys
sys.stdout.write(re.sub(r"@([A-Z]+)@", lambda m: os.environ["K_"+m[1]], open(sys.argv[1]).read()))' "$here/slurm.conf.in" >"$conf"
export SLURM_CONF=$conf
for v in $(compgen -e | grep -E '^(SLURM_|SBATCH_|SRUN_|SLURMD_)' | grep -vE '^SLURM_CONF'); do unset "$v"; done  # never inherit an outer job

if [ "$auth" = munge ]; then
  ( umask 077; head -c 1024 /dev/urandom >"$dir/munge.key" )
  munged --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
         --log-file="$dir/log/munged.log" --seed-file="$dir/munged.seed" --num-threads=4 || die "munged did not start"
fi

if [ "$mode" = flat ]; then
  slurmctld -f "$conf" || die "slurmctld did not start"
  printf "#!/bin/sh\nexport SLURM_CONF=%s\nexec \"\$@\"\n" "$conf" >"$dir/in"   # same interface as in netns mode: DIR/in CMD...
else
  # one holder process per namespace set; its pid (seen from here) is in DIR/pid/NAME, killing it ends everything inside
  holder() { # NAME
    rm -f "$dir/pid/$1"
    LAB_NAME=$1 LAB_DIR=$dir setsid unshare -n -u -m -i -p --fork --kill-child --mount-proc --propagation private bash -c '
      hostname "$LAB_NAME"; mount --bind "$LAB_DIR/hosts" /etc/hosts; mount -t tmpfs -o size=2g shm /dev/shm
      ip link set lo up; trap "exit 0" TERM
      : test-cluster "$LAB_DIR"; while :; do sleep 1000 & wait $!; done' >>"$dir/log/holder.$1.log" 2>&1 </dev/null &
    local up=$!; disown
    for _ in $(seq 1500); do
      p=$(cat /proc/$up/task/$up/children 2>/dev/null | tr -d ' ') || p=
      if [ -n "$p" ] && nsenter -t "$p" -u hostname 2>/dev/null | grep -qx "$1"; then echo "$p" >"$dir/pid/$1"; return 0; fi
      sleep 0.02
    done
    return 1
  }
  holder ctl || die "namespace ctl"
  C=$(cat "$dir/pid/ctl")
  nsenter -t "$C" -n sh -c 'ip link add br0 type bridge && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up'
  cat >"$dir/in" <<'X'
#!/bin/bash
# DIR/in CMD...         run CMD as a client (login node) of the cluster
# DIR/in @nodeN CMD...  run CMD on that node
d=$(cd "$(dirname "$0")" && pwd -P); export SLURM_CONF=$d/slurm.conf; n=ctl; case "${1:-}" in @*) n=${1#@}; shift;; esac
exec nsenter -t "$(cat "$d/pid/$n")" -n -u -m -i -p --wd="$PWD" -- "$@"
X
  chmod +x "$dir/in"
  "$dir/in" slurmctld -f "$conf" || die "slurmctld did not start"
fi
chmod +x "$dir/in"

cat >"$dir/node_up" <<'X'
#!/bin/bash
# DIR/node_up nodeN   (re)start a node
set -e; d=$(cd "$(dirname "$0")" && pwd -P); n=$1; export SLURM_CONF=$d/slurm.conf; PATH=/usr/sbin:/sbin:$PATH
mkdir -p "$d/spool/$n"
X
if [ "$mode" = flat ]; then cat >>"$dir/node_up" <<'X'
exec slurmd -f "$d/slurm.conf" -N "$n"
X
else { declare -f holder | sed 's/\$dir/$d/g'; cat <<'X'; } >>"$dir/node_up"
i=${n#node}; holder "$n" || { echo "node_up: no namespace for $n" >&2; exit 1; }
N=$(cat "$d/pid/$n"); C=$(cat "$d/pid/ctl")
nsenter -t "$C" -n ip link del "v$i" 2>/dev/null || true
nsenter -t "$C" -n ip link add "v$i" type veth peer name eth0 netns "$N"
nsenter -t "$C" -n ip link set "v$i" master br0 up
nsenter -t "$N" -n sh -c "ip addr add 10.77.0.$((10+i))/24 dev eth0 && ip link set eth0 up"
exec "$d/in" "@$n" slurmd -f "$d/slurm.conf" -N "$n"
X
fi
chmod +x "$dir/node_up"
for i in $(seq "$nodes"); do echo "node$i" >>"$dir/nodes"; "$dir/node_up" "node$i" || die "slurmd node$i did not start"; done

ok=
for _ in $(seq 1200); do
  n=$("$dir/in" sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l) || n=0
  [ "$n" = "$nodes" ] && { ok=1; break; }
  sleep 0.1
done
[ -n "$ok" ] || { "$dir/in" sinfo -N -l >&2 || true; die "the nodes did not become idle in 120 s"; }
echo "export SLURM_CONF=$conf"
echo "export LAB_DIR=$dir"
