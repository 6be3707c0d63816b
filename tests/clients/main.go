// The Go client that openapi-generator makes.
package main

import (
	"context"
	"encoding/json"
	"log"
	"os"
	"time"

	pman "pman.test/pman"
)

func main() {
	config := pman.NewConfiguration()
	config.Servers = pman.ServerConfigurations{{URL: os.Args[1]}}
	api := pman.NewAPIClient(config).DefaultAPI
	ctx := context.Background()
	var request pman.JobRequest
	text, err := os.ReadFile(os.Args[2])
	must(err)
	must(json.Unmarshal(text, &request))
	request.Jid = "go"
	job, answer, err := api.Submit(ctx).JobRequest(request).Execute()
	must(err)
	check(answer.StatusCode == 201, "submit")
	for job.Status == "notstarted" || job.Status == "started" {
		time.Sleep(200 * time.Millisecond)
		job, _, err = api.Read(ctx, "go").Tail(10).Execute()
		must(err)
	}
	check(job.Status == "finishedSuccessfully" && job.Logs == "hello\n", "the end and its logs")
	wrong := request
	wrong.CpuLimit = -1
	_, answer, err = api.Submit(ctx).JobRequest(wrong).Execute()
	check(err != nil && answer.StatusCode == 400, "a wrong field")
	answer, err = api.Delete(ctx, "go").Execute()
	must(err)
	check(answer.StatusCode == 204, "delete")
	_, answer, err = api.Read(ctx, "go").Execute()
	check(err != nil && answer.StatusCode == 404, "gone")
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func check(holds bool, what string) {
	if !holds {
		log.Fatal("failed: ", what)
	}
	log.Print("ok ", what)
}
