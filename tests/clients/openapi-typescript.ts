// The types that openapi-typescript makes, with openapi-fetch.
import createClient from "openapi-fetch";
import type { components, paths } from "./schema";
import { check, hello, pause, request, url } from "./common";

const client = createClient<paths>({ baseUrl: url });
const body: components["schemas"]["JobRequest"] = { ...request, jid: "openapi-typescript" };
const path = { jid: body.jid };

async function main() {
  const posted = await client.POST("/api/v1/", { body });
  check(posted.response.status === 201, "submit");
  let job = posted.data;
  while (job?.status === "notstarted" || job?.status === "started") {
    await pause();
    job = (await client.GET("/api/v1/{jid}/", { params: { path, query: { tail: 10 } } })).data;
  }
  check(job?.status === "finishedSuccessfully" && job.logs === hello, "the end and its logs");
  const wrong = await client.POST("/api/v1/", { body: { ...body, cpu_limit: -1 } });
  const message = wrong.error?.message;
  check(typeof message === "object" && "cpu_limit" in message, "a sentence for the wrong field");
  check((await client.DELETE("/api/v1/{jid}/", { params: { path } })).response.status === 204, "delete");
  check((await client.GET("/api/v1/{jid}/", { params: { path } })).response.status === 404, "gone");
}

void main();
