# A server with two windows, clients that come and go, and one that stays attached on a terminal of its own.
set -e
export TERM=screen LC_ALL=C.UTF-8
t() { tmux -S "$PWD/tmux.sock" -f /dev/null "$@"; }
tmux -D -S "$PWD/tmux.sock" -f /dev/null &
server=$!
# -N: the client that comes first must not start a server of its own, or the one above ends as a client of that.
until t -N start-server 2>/dev/null; do sleep 0.05; done
t new-session -d -s work -x 100 -y 30 "sh"
t set-option -g remain-on-exit on
mkfifo hold
script -q -c "tmux -S '$PWD/tmux.sock' attach -t work" /dev/null >attached <>hold &
client=$!
t new-window -t work -n count "i=0; while [ \$i -lt 400000 ]; do i=\$((i+1)); done; echo counted \$i; tmux -S '$PWD/tmux.sock' wait-for -S counted; sleep 1000"
n=0
while [ $n -lt 8 ]; do
  n=$((n + 1))
  t send-keys -t work:0 "seq 1 20000 | cksum; echo said $n; tmux -S '$PWD/tmux.sock' wait-for -S said$n" Enter
  t wait-for said$n
done
t wait-for counted
t capture-pane -p -t work:count | sed '/^$/d'
t send-keys -t work:0 "clear; echo last; tmux -S '$PWD/tmux.sock' wait-for -S last" Enter
t wait-for last
t capture-pane -p -t work:0 | grep -c last
t list-windows -F '#{window_index} #{pane_dead}'
t kill-server
wait $server || true
wait $client || true
echo "all ended"
