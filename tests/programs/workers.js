// Three workers with a hash chain each, which also talk through shared memory and messages.
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const crypto = require('crypto');
const STEPS = 300000;
if (isMainThread) {
  const shared = new SharedArrayBuffer(16);
  const out = [];
  let left = 3;
  let messages = 0;
  for (let n = 0; n < 3; n++) {
    const worker = new Worker(__filename, { workerData: { n, shared } });
    worker.on('message', (m) => { if (m.step) messages++; else out[n] = m.end; });
    worker.on('exit', () => {
      if (--left === 0) console.log([...out, messages, Atomics.load(new Int32Array(shared), 0)].join('\n'));
    });
  }
} else {
  const { n, shared } = workerData;
  const counter = new Int32Array(shared);
  let h = 'x' + n;
  const kept = [];
  for (let i = 0; i < STEPS; i++) {
    h = crypto.createHash('sha256').update(h).digest('hex');
    if (i % 1000 === 0) { kept.push(h); parentPort.postMessage({ step: i + 1 }); }
    Atomics.add(counter, 0, 1);
  }
  parentPort.postMessage({ end: h + ' ' + kept.length });
}
