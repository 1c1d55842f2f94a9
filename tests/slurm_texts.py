"""What SLURM's commands wrote: recorded from version 22.05, the larger site put together in the same form."""

from __future__ import annotations

from pwm_torchrl.cluster.slurm import Site, parse_config, parse_nodes, parse_partitions

SQUEUE = """\
33_2|PENDING|0:00||JobArrayTaskLimit
35|PENDING|0:00||Dependency
31|PENDING|0:00||launch failed requeued held
33_0|RUNNING|1-02:00:04|n[0-1]|None
42|PENDING|0:00||PartitionConfig
34|COMPLETED|0:01|n0|None
11|TIMEOUT|1:24|n0|TimeLimit
"""

SACCT = """\
7|COMPLETED|00:00:01|n0|None
8|CANCELLED by 1000|00:00:01|None assigned|None
9_1|OUT_OF_MEMORY|00:10:01|n0|None
9_[2-4%2]|PENDING|00:00:00|None assigned|JobArrayTaskLimit
"""

JOB = (
    "JobId=37 ArrayJobId=33 ArrayTaskId=1 ArrayTaskThrottle=2 JobName=my run=1 UserId=root(0) Priority=4294901728 "
    "Account=(null) QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 ExitCode=0:0 "
    "DerivedExitCode=0:125 PreemptTime=2026-11-25T03:35:47 ReqB:S:C:T=0:0:*:* TRES=cpu=1,mem=100M,node=1,billing=1 "
    "Command=/home/a b/script.sh StdErr=/tmp/37.out Power="
)

CONFIG = """\
Configuration data as of 2026-11-25T03:43:43
AccountingStorageType   = accounting_storage/none
AuthInfo                = socket=/run/munge.socket,cred_expire=5
ClusterName             = throwaway
EnforcePartLimits       = NO
JobRequeue              = 1
KillWait                = 3 sec
MaxArraySize            = 11
MaxMemPerNode           = UNLIMITED
MinJobAge               = 600 sec
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""

PARTITIONS = (
    "PartitionName=main AllowGroups=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=00:05:00 GraceTime=0 Hidden=NO "
    "MaxNodes=UNLIMITED MaxTime=1-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[0-1] State=UP "
    "TotalCPUs=8 TotalNodes=2 JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=8,node=2\n"
    "PartitionName=gpu Default=NO MaxNodes=2 MaxTime=UNLIMITED MaxCPUsPerNode=48 Nodes=g[0-2] State=UP "
    "MaxMemPerNode=400000\n"
    "PartitionName=old Default=NO MaxNodes=UNLIMITED MaxTime=7-00:00:00 Nodes=o0 State=DOWN MaxMemPerNode=UNLIMITED\n"
)

NODES = (
    "NodeName=n0 Arch=x86_64 CoresPerSocket=1  CPUAlloc=0 CPUEfctv=4 CPUTot=4 CPULoad=4.88 AvailableFeatures=(null) "
    "ActiveFeatures=(null) Gres=(null) NodeAddr=127.0.0.1 OS=Linux 6.18.44 #1 SMP PREEMPT_DYNAMIC @0  RealMemory=6000 "
    "State=IDLE+COMPLETING ThreadsPerCore=1 Partitions=main  CfgTRES=cpu=4,mem=6000M,billing=4 AllocTRES=\n"
    "NodeName=n1 CPUTot=4 AvailableFeatures=(null) Gres=(null) RealMemory=6000 State=DOWN+NOT_RESPONDING "
    "Partitions=main Reason=Not responding [root@2026-11-25T03:42:27]\n"
    "NodeName=g0 CPUTot=64 AvailableFeatures=l40s,ib Gres=gpu:l40s:4(S:0-1),lustre:1 RealMemory=515000 State=MIXED "
    "Partitions=gpu\n"
    "NodeName=g1 CPUTot=64 AvailableFeatures=l40s,ib Gres=gpu:l40s:4(S:0-1) RealMemory=515000 State=IDLE+DRAIN "
    "Partitions=gpu\n"
    "NodeName=g2 CPUTot=96 AvailableFeatures=h100,ib Gres=gpu:nvidia_h100_80gb_hbm3:8(S:0-1) RealMemory=1030000 "
    "State=ALLOCATED Partitions=gpu\n"
    "NodeName=o0 CPUTot=16 AvailableFeatures=(null) Gres=gpu:2 RealMemory=64000 State=IDLE Partitions=old\n"
)

SITE = Site(parse_config(CONFIG), tuple(parse_partitions(PARTITIONS)), tuple(parse_nodes(NODES)))
