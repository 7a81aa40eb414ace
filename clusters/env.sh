# Settings of a cluster's environment. Edit before `ray up`; copied to every machine. No secrets here.

# Storage that all machines share, for checkpoints, exports and model downloads. One of
#   a mounted folder:                                ACPO_SHARED=/mnt/acpo, with ACPO_NFS empty
#   an NFS or EFS export, mounted at ACPO_SHARED:    ACPO_NFS=fs-0123456789abcdef0.efs.us-east-1.amazonaws.com:/
export ACPO_SHARED=${ACPO_SHARED:-/mnt/acpo}
export ACPO_NFS=${ACPO_NFS:-}

# For machines with several networks: the network (or addresses, separated by commas) that may connect to Ray, such as
# 10.0.0.0/24; nft rejects other new connections to ports from 1024 on. Empty if a firewall, such as a cloud's security
# group, does this: Ray's processes listen on every address.
export ACPO_NETWORK=${ACPO_NETWORK:-}

# MLflow's database and artifact store; both may be remote (postgresql://…, s3://…).
export ACPO_MLFLOW_DB=${ACPO_MLFLOW_DB:-sqlite:///$ACPO_SHARED/mlflow.db}
export ACPO_MLFLOW_ARTIFACTS=${ACPO_MLFLOW_ARTIFACTS:-$ACPO_SHARED/mlartifacts}
export ACPO_MLFLOW_PORT=${ACPO_MLFLOW_PORT:-5000}
