// The TypeScript client that openapi-generator makes.
import { Configuration, DefaultApi, JobStatusEnum, ResponseError } from "./made-typescript-fetch";
import type { JobRequest } from "./made-typescript-fetch";
import { check, hello, pause, request, url } from "./common";

const api = new DefaultApi(new Configuration({ basePath: url }));
const body: JobRequest = {
  jid: "typescript-fetch", args: request.args, auid: request.auid, numberOfWorkers: request.number_of_workers,
  cpuLimit: request.cpu_limit, memoryLimit: request.memory_limit, gpuLimit: request.gpu_limit, image: request.image,
  entrypoint: request.entrypoint, type: request.type,
};

async function code(call: Promise<unknown>): Promise<number> {
  try {
    await call;
    return 200;
  } catch (error) {
    return error instanceof ResponseError ? error.response.status : 0;
  }
}

async function main() {
  let job = await api.submit({ jobRequest: body });
  while (job.status === JobStatusEnum.Notstarted || job.status === JobStatusEnum.Started) {
    await pause();
    job = await api.read({ jid: body.jid, tail: 10 });
  }
  check(job.status === JobStatusEnum.FinishedSuccessfully && job.logs === hello, "the end and its logs");
  check((await code(api.submit({ jobRequest: { ...body, cpuLimit: -1 } }))) === 400, "a wrong field");
  await api._delete({ jid: body.jid });
  check((await code(api.read({ jid: body.jid }))) === 404, "gone");
}

void main();
