#!/bin/sh
# Runs in a database container when its data folder has just been created. Creates a role and a
# database for the service, and removes the superuser's password, so that it can connect only from
# inside the container.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_USER" \
  --set service="$GOZON_SERVICE" --set password="$GOZON_SERVICE_PASSWORD" --set superuser="$POSTGRES_USER" <<'SQL'
CREATE ROLE :"service" LOGIN PASSWORD :'password';
CREATE DATABASE :"service" OWNER :"service";
ALTER ROLE :"superuser" PASSWORD NULL;
SQL
