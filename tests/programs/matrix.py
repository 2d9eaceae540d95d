"""numpy with the threads of its BLAS: products, an inverse, a Fourier transform, sorting."""
import hashlib
import numpy

random = numpy.random.default_rng(7)


def show(name, array):
    print(name, array.shape, hashlib.sha256(numpy.ascontiguousarray(array).tobytes()).hexdigest(), flush=True)


a = random.integers(0, 9, (900, 900)).astype(numpy.float64)
for step in range(10):
    # Whole numbers below 2^53: the same bits in whatever order they are summed.
    a = (a @ a.T) % 7
    show(f"product {step}", a)
wide = random.standard_normal(1 << 21)
for step in range(4):
    wide = numpy.fft.irfft(numpy.fft.rfft(wide) * 0.5) + numpy.sort(wide)[::-1]
    show(f"transform {step}", wide)
b = random.standard_normal((300, 300))
print("inverse", bool(numpy.allclose(numpy.linalg.inv(b) @ b, numpy.eye(300))))
