import java.util.*;
import java.util.concurrent.*;

/** Four threads that fill maps, with the compiler and the collectors beside them. */
public class Work {
    static long chain(int n) {
        Map<Long, Long> seen = new HashMap<>();
        long x = n;
        for (int i = 0; i < 1_500_000; i++) {
            x = x * 6364136223846793005L + 1442695040888963407L;
            seen.merge(x >>> 48, 1L, Long::sum);
        }
        long sum = 0;
        for (Map.Entry<Long, Long> e : new TreeMap<>(seen).entrySet()) sum = sum * 31 + e.getKey() * e.getValue();
        return sum;
    }

    public static void main(String[] arguments) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(4);
        List<Future<Long>> chains = new ArrayList<>();
        for (int n = 0; n < 8; n++) {
            final int k = n;
            chains.add(pool.submit(() -> chain(k)));
        }
        for (Future<Long> chain : chains) System.out.println(chain.get());
        pool.shutdown();
    }
}
