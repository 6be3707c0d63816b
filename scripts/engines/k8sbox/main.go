// k8sbox is one program that holds every part of a one-node Kubernetes for tests:
// etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet and kubectl.
//
// One program, because the parts share most of their packages: built apart they need
// about four times the disk and twice the time. It is called either through a link that bears
// the part's name (bin/kubectl get pods) or with that name as first argument (k8sbox kubectl get pods).
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	_ "time/tzdata" // the time zones of CronJobs, on machines without tzdata

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"

	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"          // --logging-format=json
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client metrics on /metrics
	_ "k8s.io/component-base/metrics/prometheus/version"  // version metric on /metrics
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// Each constructor runs only when its part is called: they register flags and metrics globally.
var parts = map[string]func() *cobra.Command{
	"etcd":                    newEtcdCommand,
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
	"kubectl":                 kubectl.NewDefaultKubectlCommand,
}

// newEtcdCommand embeds the etcd server: its own main package would bring a second flag parser and its proxies.
func newEtcdCommand() *cobra.Command {
	return &cobra.Command{
		Use:          "etcd CONFIG.yaml",
		Args:         cobra.ExactArgs(1),
		SilenceUsage: true,
		RunE:         func(_ *cobra.Command, args []string) error { return serveEtcd(args[0]) },
	}
}

func serveEtcd(configFile string) error {
	config, err := embed.ConfigFromFile(configFile)
	if err != nil {
		return err
	}
	server, err := embed.StartEtcd(config)
	if err != nil {
		return err
	}
	defer server.Close()
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	select {
	case <-stop.Done():
		return nil
	case err := <-server.Err():
		return err
	}
}

// part finds the part's name and drops what comes before it from os.Args: each part reads os.Args itself.
func part() string {
	name := filepath.Base(os.Args[0])
	if _, known := parts[name]; !known && len(os.Args) > 1 {
		os.Args = os.Args[1:]
		name = os.Args[0]
	}
	return name
}

func main() {
	newCommand, known := parts[part()]
	if !known {
		fmt.Fprintln(os.Stderr, "usage: k8sbox etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubelet|kubectl [ARGUMENT]...")
		os.Exit(2)
	}
	os.Exit(cli.Run(newCommand()))
}
