// What the TypeScript clients share.
import given from "./request.json";

export const url: string = process.argv[2] ?? "";
export const request = { ...given, type: "fs" as const };
export const hello = "hello\n";
export const pause = () => new Promise((done) => setTimeout(done, 200));

export function check(holds: boolean, what: string): asserts holds {
  if (!holds) {
    console.error(`failed: ${what}`);
    process.exit(1);
  }
  console.log(`ok ${what}`);
}
