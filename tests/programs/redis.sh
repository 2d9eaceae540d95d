# A server and its clients, over a Unix socket, or with `tcp` over TCP: writes, a list that one waits on, a transaction, a snapshot by a child of the server.
set -e
case $1 in
tcp) at="-p $((20000 + $$ % 10000))" listen="--port ${at#-p } --bind 127.0.0.1" ;;
*) at="-s ./redis.sock" listen="--port 0 --unixsocket ./redis.sock" ;;
esac
redis-server $listen --dir . --save '' --appendonly no --loglevel warning --daemonize no >server.log 2>&1 &
server=$!
cli() { redis-cli $at "$@"; }
until cli ping >/dev/null 2>&1; do sleep 0.05; done
cli --raw blpop ready 60 >popped &
popper=$!
i=0
while [ $i -lt 12 ]; do
  i=$((i + 1))
  awk -v i=$i 'BEGIN { for (n = 0; n < 4000; n++) { printf "SET key%d:%d %d\n", i, n, n * i; printf "INCRBY sum %d\n", n; printf "RPUSH list%d %d\n", i, n * 7919 % 4001 } }' | cli >answers.$i
  cli --raw eval "local s = 0 for _, v in ipairs(redis.call('lrange', KEYS[1], 0, -1)) do s = (s * 31 + v) % 1000000007 end return s" 1 list$i
  cli --raw sort list$i limit 0 5 desc
done
printf 'MULTI\nINCR a\nINCR a\nGET sum\nEXEC\n' | cli --raw
cli --raw bgsave >/dev/null
cli --raw lpush ready "$(cli --raw dbsize)"
wait $popper
cat popped
cksum answers.*
while [ "$(cli --raw info persistence | tr -d '\r' | sed -n 's/^rdb_bgsave_in_progress://p')" != 0 ]; do sleep 0.05; done
cli --raw info persistence | tr -d '\r' | grep ^rdb_last_bgsave_status
cli shutdown nosave || true
wait $server
echo "the server ended with $?"
