// Submits to BullMQ: one|bulk TASK COUNT [RATE]; prints what `bench.peers.submitting` says.
import { setTimeout as sleep } from "node:timers/promises";
import { Queue } from "bullmq";

const CHUNK = 1000;
const [how, task, count, rate] = process.argv.slice(2).map((word, i) => (i < 2 ? word : Number(word)));
const { hostname: host, port } = new URL(process.env.BENCH_JOBS);
const queue = new Queue("bench", { connection: { host, port: Number(port) } });
const argument = (number) => (task === "stamp" ? performance.timeOrigin + performance.now() : number);

const size = how === "bulk" ? CHUNK : 1;
const begin = performance.now();
let clock = begin;
let counted = count;
for (let first = 0; first < count; first += size) {
  if (first === size) {
    clock = performance.now();
    counted -= size;
  }
  if (rate) await sleep(Math.max(0, begin + (first * 1000) / rate - performance.now()));
  if (how === "bulk") {
    const numbers = Array.from({ length: Math.min(size, count - first) }, (_, i) => first + i);
    await queue.addBulk(numbers.map((number) => ({ name: task, data: { argument: argument(number) } })));
  } else {
    await queue.add(task, { argument: argument(first) });
  }
}
console.log(JSON.stringify({ seconds: (performance.now() - clock) / 1000, jobs: counted }));
await queue.close();
