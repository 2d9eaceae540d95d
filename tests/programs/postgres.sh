# A cluster of its own, its server with its processes, and clients over a Unix socket. Not as root: the server refuses that.
set -e
# Not cp: it compares the device of a file by its name with that of its descriptor, and takes a file for another one when
# it was moved in between (the README says so).
python3 -c 'import shutil; shutil.copytree("../pristine", "cluster")'
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
$bin/postgres -D cluster -k "$PWD" -c listen_addresses= -c fsync=off -c log_checkpoints=off >server.log 2>&1 &
server=$!
sql() { $bin/psql -X -q -A -t -v ON_ERROR_STOP=1 -h "$PWD" -U postgres postgres "$@"; }
until sql -c 'SELECT 1' >/dev/null 2>&1; do sleep 0.1; kill -0 $server; done 2>/dev/null
sql <<'END'
CREATE TABLE t (id int PRIMARY KEY, a text, b bigint);
INSERT INTO t SELECT i, md5(i::text), i::bigint * 48271 % 2147483647 FROM generate_series(1, 100000) AS i;
CREATE INDEX ti ON t (a);
END
# Two at once; the rows are locked, one waits for the other.
for n in 1 2; do
  sql -c "BEGIN; UPDATE t SET b = b + $n WHERE id <= 20000; SELECT count(*) FROM t WHERE a LIKE '%$n%'; COMMIT" >client.$n &
  clients="$clients $!"
done
wait $clients
cat client.1 client.2
sql <<'END'
LISTEN news;
SELECT sum(b), md5(string_agg(a, ',' ORDER BY id)) FROM t;
DELETE FROM t WHERE id % 3 = 0;
VACUUM ANALYZE t;
SELECT left(a, 1) AS first, count(*), sum(b) FROM t GROUP BY 1 ORDER BY 1;
SELECT count(*) FROM t AS x JOIN t AS y ON x.b % 1009 = y.id WHERE x.a > y.a;
CHECKPOINT;
SELECT md5(string_agg(id::text || a || b::text, ',' ORDER BY id)) FROM t;
END
kill -INT $server
wait $server
echo "the server ended with $?"
