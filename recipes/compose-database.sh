#!/bin/sh
# Runs in the container of a database when its data folder was just made: gives the service a role and a database of its
# own, and takes the superuser's password away, so that it can only come in from inside the container.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_USER" \
  --set service="$GOZON_SERVICE" --set password="$GOZON_SERVICE_PASSWORD" --set superuser="$POSTGRES_USER" <<'SQL'
CREATE ROLE :"service" LOGIN PASSWORD :'password';
CREATE DATABASE :"service" OWNER :"service";
ALTER ROLE :"superuser" PASSWORD NULL;
SQL
