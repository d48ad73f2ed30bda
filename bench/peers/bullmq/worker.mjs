// BullMQ's jobs. The one argument: how many at once. Completed jobs and what they returned are kept, as is its default.
import { appendFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "bullmq";

const tasks = {
  noop: async (number) => number,
  nap: async (number) => {
    await sleep(50);
    return number;
  },
  // Milliseconds with a fraction from a clock that is monotonic, begun at the wall clock's time.
  stamp: async (atMs) => {
    const late = performance.timeOrigin + performance.now() - atMs;
    appendFileSync(process.env.BENCH_STAMPS, `${Math.round(late * 1e6)}\n`);
    return atMs;
  },
};

const { hostname: host, port } = new URL(process.env.BENCH_JOBS);
const worker = new Worker("bench", (job) => tasks[job.name](job.data.argument), {
  connection: { host, port: Number(port), maxRetriesPerRequest: null },
  concurrency: Number(process.argv[2]),
});
worker.on("error", (error) => console.error(error));
process.on("SIGTERM", () => worker.close().then(() => process.exit(0)));
