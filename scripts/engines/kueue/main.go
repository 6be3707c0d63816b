// kueue is Kueue (https://kueue.sigs.k8s.io) with the queues of batch/v1 Jobs alone. It runs beside the cluster, and not
// in it: Kueue's webhooks are left out, because an API server could not reach them there. So a Job must be made suspended.
package main

import (
	"os"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/discovery"
	core "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"

	configuration "sigs.k8s.io/kueue/apis/config/v1beta2"
	api "sigs.k8s.io/kueue/apis/kueue/v1beta2"
	queue "sigs.k8s.io/kueue/pkg/cache/queue"
	cache "sigs.k8s.io/kueue/pkg/cache/scheduler"
	"sigs.k8s.io/kueue/pkg/config"
	"sigs.k8s.io/kueue/pkg/constants"
	controllers "sigs.k8s.io/kueue/pkg/controller/core"
	"sigs.k8s.io/kueue/pkg/controller/core/indexer"
	"sigs.k8s.io/kueue/pkg/controller/jobframework"
	_ "sigs.k8s.io/kueue/pkg/controller/jobs/job" // registers itself
	"sigs.k8s.io/kueue/pkg/scheduler"
	preemption "sigs.k8s.io/kueue/pkg/scheduler/preemption/expectations"
	"sigs.k8s.io/kueue/pkg/util/kubeversion"
)

func must(err error) {
	if err != nil {
		ctrl.Log.Error(err, "kueue ends")
		os.Exit(1)
	}
}

func main() {
	if len(os.Args) != 2 {
		os.Stderr.WriteString("usage: kueue CONFIGURATION.yaml, with the cluster in KUBECONFIG\n")
		os.Exit(2)
	}
	ctrl.SetLogger(zap.New())
	stop := ctrl.SetupSignalHandler()
	scheme := runtime.NewScheme()
	must(core.AddToScheme(scheme))
	must(api.AddToScheme(scheme))
	must(configuration.AddToScheme(scheme))
	options, given, err := config.Load(scheme, os.Args[1])
	must(err)
	config.AddWebhookSettingsTo(&options, &given)
	cluster := ctrl.GetConfigOrDie()
	manager, err := ctrl.NewManager(cluster, options)
	must(err)
	client := manager.GetClient()

	requeuer, expectations := queue.NewRequeuer(), preemption.New()
	admitted := cache.New(client)
	waiting := queue.NewManager(client, admitted, requeuer, queue.WithPreemptionExpectations(expectations))
	jobs := jobframework.WithEnabledFrameworks(given.Integrations.Frameworks)
	must(indexer.Setup(stop, manager.GetFieldIndexer()))
	must(jobframework.SetupIndexes(stop, manager.GetFieldIndexer(), jobs))

	asker, err := discovery.NewDiscoveryClientForConfig(cluster)
	must(err)
	version := kubeversion.NewServerVersionFetcher(asker)
	must(version.FetchServerVersion())
	_, err = controllers.SetupControllers(manager, waiting, admitted, &given, nil, expectations, nil)
	must(err)
	must(jobframework.SetupControllers(stop, manager, ctrl.Log, jobs,
		jobframework.WithKubeServerVersion(version), jobframework.WithManagerName(constants.KueueName),
		jobframework.WithCache(admitted), jobframework.WithQueues(waiting)))

	go waiting.CleanUpOnContext(stop)
	go admitted.CleanUpOnContext(stop)
	must(manager.Add(requeuer))
	must(manager.Add(version))
	must(manager.Add(scheduler.New(waiting, admitted, client, manager.GetEventRecorderFor(constants.AdmissionName),
		scheduler.WithPreemptionExpectations(expectations))))
	must(manager.Start(stop))
}
