// The client that @hey-api/openapi-ts makes.
import { delete_ as remove, read, submit } from "./made-hey-api";
import { client } from "./made-hey-api/client.gen";
import type { JobRequest } from "./made-hey-api";
import { check, hello, pause, request, url } from "./common";

client.setConfig({ baseUrl: url });
const body: JobRequest = { ...request, jid: "hey-api" };
const path = { jid: body.jid };

async function main() {
  const posted = await submit({ body });
  check(posted.response?.status === 201, "submit");
  let job = posted.data;
  while (job?.status === "notstarted" || job?.status === "started") {
    await pause();
    job = (await read({ path, query: { tail: 10 } })).data;
  }
  check(job?.status === "finishedSuccessfully" && job.logs === hello, "the end and its logs");
  const wrong = await submit({ body: { ...body, cpu_limit: -1 } });
  const message = wrong.error?.message;
  check(typeof message === "object" && "cpu_limit" in message, "a sentence for the wrong field");
  check((await remove({ path })).response?.status === 204, "delete");
  check((await read({ path })).response?.status === 404, "gone");
}

void main();
